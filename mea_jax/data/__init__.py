"""Conversion of text to batches of tokens.

`sources` reads documents (`corpus` is the base of all sources, `records` has those with fields).
`tokenizers` encodes them, `packing` packs the token ids into windows, and `windows` writes the
windows with TFDS as ArrayRecord files. `prepare` runs all of this once and caches the result
(`multi_host` does so in a distributed run; `integrity` checks the cache folder). `pipeline` reads
batches from the cache with grain. `bad_input` handles input that cannot be read.
"""
