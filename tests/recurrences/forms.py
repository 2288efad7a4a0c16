"""The table of forms: every way in which people write a recurrence (`FORMS`, by name).

What a form is stands in ``written.py``; the forms themselves in ``forms_*.py``, by family.
"""

from __future__ import annotations

# The order of the table.
# isort: off
import forms_linear
import forms_decay
import forms_gated
import forms_delta
import forms_quadratic
import forms_scan
import forms_cells
import forms_torch_loops
import forms_associative
import forms_while_loops
import forms_public
import forms_negative

# isort: on
from written import FORMS, LENGTH, OUTCOMES, SIZES, Form

__all__ = ["FORMS", "LENGTH", "OUTCOMES", "SIZES", "Form"]

FAMILIES = (
    forms_linear,
    forms_decay,
    forms_gated,
    forms_delta,
    forms_quadratic,
    forms_scan,
    forms_cells,
    forms_torch_loops,
    forms_associative,
    forms_while_loops,
    forms_public,
    forms_negative,
)
