"""One way to check, warm up, time in turns, and write down: what every benchmark of this folder is run with."""
