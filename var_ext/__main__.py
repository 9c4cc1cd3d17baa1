"""`python -m var_ext`: what was built, on which chip it runs, and which backend each op has."""

from var_ext.info import describe_installation

if __name__ == "__main__":
    print(describe_installation())
