"""Documents become token shards, and shards and conversations become the batch of step N.

Reading order: stream, marks, cache, advice, shards, token_files, foreign, prepare, chunks, duplicates, crew, report,
order, batches, held_out, packing, formats, records, examples, pairs, preview.
"""
