"""The runtime inside other libraries: one file per library, which alone imports it (with its ``_<library>_*.py``)."""
