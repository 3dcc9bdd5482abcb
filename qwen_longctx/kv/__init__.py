"""Keys and values of a sequence, and what else is known of it.

`store.Store` holds the keys and values of one layer and knows no transformers; `sequence.Sequence` is the state of one
sequence beside them; `hf_cache` is the adapter that makes a transformers cache of both.
"""
