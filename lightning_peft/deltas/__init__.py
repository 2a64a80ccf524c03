"""Updates of frozen weights that hold few parameters: what the weight gains, and on which side of a layer it is computed.

``weight the layer sees = form(frozen weight, few parameters)``. A :class:`~lightning_peft.deltas.form.Form` says what that is.
It stands beside the layer, on the side of the activations, where it is alone, and on the weight where other maps act too.
"""
