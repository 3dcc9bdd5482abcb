"""What a run will need, before it starts."""


def check_fits(config, tokens, batch, dtype, free_bytes, settings):
    return None
