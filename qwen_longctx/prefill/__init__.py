"""How a prompt passes through a model: in which chunks, what it needs, and what it cost."""
