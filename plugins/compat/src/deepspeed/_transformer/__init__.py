"""``DeepSpeedTransformerLayer``: the encoder layer of BERT that DeepSpeed began with."""
