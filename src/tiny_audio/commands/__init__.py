"""One file for each verb of `tiny-audio`; `cli.py` lists them."""
