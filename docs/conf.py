"""Sphinx: `make docs` writes docs/_build/html, with warnings as errors and no network."""

import pyroflows

project = "pyroflows"
author = "The pyroflows developers"
copyright = "2026, " + author
version = release = pyroflows.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
default_role = "py:obj"

# Each part's public names are its __all__, in that order.
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = False
napoleon_use_rtype = False

myst_enable_extensions = ["colon_fence", "dollarmath"]
# The tests run the notebooks; the pages show them as they were saved.
nb_execution_mode = "off"

html_theme = "furo"
html_title = "pyroflows"
