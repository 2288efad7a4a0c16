"""The table of forms: every way in which people write a recurrence (`FORMS`, by name).

What a form is stands in ``written.py``; the forms themselves in ``forms_*.py``, by family.
"""

from __future__ import annotations

import forms_cells
import forms_decay
import forms_delta
import forms_gated
import forms_linear
import forms_negative
import forms_public
import forms_quadratic
import forms_scan
import forms_torch_loops
from written import FORMS, LENGTH, OUTCOMES, SIZES, Form

__all__ = ["FORMS", "LENGTH", "OUTCOMES", "SIZES", "Form"]

FAMILIES = (
    forms_linear,
    forms_decay,
    forms_gated,
    forms_scan,
    forms_delta,
    forms_quadratic,
    forms_cells,
    forms_torch_loops,
    forms_public,
    forms_negative,
)
