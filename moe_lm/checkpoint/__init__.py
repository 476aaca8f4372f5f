"""The checkpoint folder: written whole, verified, and read by rows into any layout.

Reading order: checkpoint, write, placement, read, safetensors_file, retain, recovery, lineage, carried, bucket, upload,
host_memory, saver.
"""
