"""Helpers of FTWT: gates of channels, their predictors, and the networks that skip what is predicted."""
