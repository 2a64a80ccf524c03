"""What FTWT alone needs: gates of channels, their predictors, and the networks that skip what is predicted."""
