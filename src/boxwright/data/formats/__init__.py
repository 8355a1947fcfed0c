"""One file a dataset format; each turns files into `Record`s and back."""
