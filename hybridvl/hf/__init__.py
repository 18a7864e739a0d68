"""hybridvl models in transformers: auto classes load our folders, `model.generate` and the Trainer drive them."""
