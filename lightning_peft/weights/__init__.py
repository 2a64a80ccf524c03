"""Everything between a stored tensor and the weight a layer sees: weight maps, masks, importance scores.

Tensor mathematics and the registration of maps; no schedules and no Trainer.
"""
