"""Text to batches of tokens.

`sources` reads documents, `tokenizers` turns them into ids, `packing` lays them into windows,
`windows` writes those with TFDS as ArrayRecord, `prepare` runs all of it once and caches the
result, and `pipeline` reads batches from the cache with grain.
"""
