"""Configuration of the documentation site: ``sphinx-build -W -n docs build/docs``, without the network."""

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

from ignite_ema import __version__  # noqa: E402  # the package is installed, with the extra "docs"

project = "ignite_ema"
author = "The ignite_ema authors"
project_copyright = author
version = release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "command_help",
    "mathml",
]
exclude_patterns = ["_ext", "_static"]
nitpicky = True

# Pages
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
myst_html_meta = {
    "description": "Averages of a model's weights (EMA, SWA, post-hoc EMA) while PyTorch-Ignite trains it.",
}
nb_execution_mode = "off"  # the pages show what was committed; the tests execute every notebook
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # no scripts from elsewhere
nb_merge_streams = True

# Reference
autosummary_generate = False  # the lists on top of the reference pages; autodoc writes the entries
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autoclass_content = "class"
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]
# What belongs to other packages is not linked: their inventories are on the network. Nor are the modules behind the
# public names.
nitpick_ignore_regex = [
    ("py:.*", r"(?!ignite_ema\.).*"),
    ("py:.*", r"ignite_ema\.(averaging|handlers|cli)(\..*)?"),
    ("py:.*", r"ignite_ema\.(checkpoints|posthoc|distributed)\.[a-z_]+\..*"),
]

# Look
html_theme = "furo"
html_title = f"ignite_ema {version}"
html_static_path = ["_static"]
html_favicon = "_static/favicon.svg"
html_search_scorer = str(HERE / "_static" / "search_scorer.js")
html_css_files = ["site.css"]
html_show_sphinx = False
html_theme_options = {
    "top_of_page_buttons": [],
    "light_css_variables": {"color-brand-primary": "#0b5d94", "color-brand-content": "#0b5d94"},
    "dark_css_variables": {"color-brand-primary": "#6cb8ea", "color-brand-content": "#6cb8ea"},
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# The notebooks lie beside docs/, where people look for them; Sphinx wants them inside.
shutil.rmtree(HERE / "notebooks", ignore_errors=True)
shutil.copytree(HERE.parent / "notebooks", HERE / "notebooks", dirs_exist_ok=True)
