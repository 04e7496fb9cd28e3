"""Before any test: annotations are enforced, torch runs on one thread, hypothesis repeats itself."""

import sys

import hypothesis
import jaxtyping
import torch

# Types and shapes in retrograd's annotations are checked at every call. The hook sees only modules imported after it.
assert "retrograd" not in sys.modules, "retrograd was imported before the import hook, so its annotations are not checked."
jaxtyping.install_import_hook("retrograd", "beartype.beartype")

torch.set_num_threads(1)  # small models: threads cost more than they give, and two workers share the cores

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, max_examples=25, print_blob=True)
hypothesis.settings.load_profile("ci")
