"""Methods that make a network generalise better without changing what it is: loss terms and weight reparametrisations.

Methods whose aim is fewer weights, fewer parameters or adaptation at test time belong to their own families.
"""
