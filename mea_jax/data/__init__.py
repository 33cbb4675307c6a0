"""Text to batches of tokens.

`sources` reads documents (`corpus`: what all kinds share, `records`: those with fields),
`tokenizers` turns them into ids, `packing` lays them into windows, `windows` writes those with TFDS
as ArrayRecord, `prepare` runs all of it once and caches the result (`shared`: for a run of several
processes; `cache`: its folder), and `pipeline` reads batches from the cache with grain. What is
wrong with the input goes through `bad_input`.
"""
