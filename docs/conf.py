"""How Sphinx builds these pages: `make docs`."""

from importlib.metadata import version as installed_version
from pathlib import Path

ROOT = Path(__file__).parents[1]

project = "retrograd"
author = "The retrograd developers"
copyright = author
version = release = installed_version("retrograd")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# The examples are run when the pages are built, so what they show is what the code does.
if (ROOT / "examples" / "GALLERY_HEADER.rst").exists():
    extensions.append("sphinx_gallery.gen_gallery")
    sphinx_gallery_conf = {
        "examples_dirs": [str(ROOT / "examples")],
        "gallery_dirs": ["examples"],
        "filename_pattern": r"[0-9]+_.*\.py",
        "within_subsection_order": "FileNameSortKey",
        "download_all_examples": False,
        "show_signature": False,
        "abort_on_example_error": True,
    }

html_theme = "furo"
html_title = "retrograd"
