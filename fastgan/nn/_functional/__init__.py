"""The functions of ``fastgan.nn.functional``, a file a kind."""
