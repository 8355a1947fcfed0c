"""Every named detector: one builder each, the numbers in plain sight. A new name is one function in one of these files.

A builder's options are keyword-only; `num_classes` counts foreground classes.
"""
