"""Networks that compute only the channels an input needs: predictors, layers that gather, building and calibrating them.

Everything here runs without a Trainer and without the method that trained the predictors; finding units of channels belongs to
``attach``, training predictors to a method.
"""
