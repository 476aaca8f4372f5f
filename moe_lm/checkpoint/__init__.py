"""The checkpoint folder: written whole, verified, and read by rows into any layout.

Reading order: checkpoint, checkpoint_tensors, reader, safetensors_file, adapters, start, saver.
"""
