"""Assertions that decide whether a load, a way back or a resume is right; they share no code with the engine.

The oracle is the *twin*: the state that a user reaches without this package, by loading the float weights into the
float model, preparing it and calibrating it with the quantizers' own code (:func:`native_calibration`). What the
package gives on a freshly prepared model must equal it bit for bit. Use these in your own test-suite, with your own
model and `prepare`.
"""

from __future__ import annotations

from qat_compat.testing.assertions import Twin, assert_resume, assert_round_trip, assert_twin
from qat_compat.testing.calibration import native_calibration
from qat_compat.testing.comparison import assert_same_output, assert_same_state
from qat_compat.testing.models import QATModel, qat_model
from qat_compat.testing.scrambling import scramble

__all__ = [
    "QATModel",
    "Twin",
    "assert_resume",
    "assert_round_trip",
    "assert_same_output",
    "assert_same_state",
    "assert_twin",
    "native_calibration",
    "qat_model",
    "scramble",
]
