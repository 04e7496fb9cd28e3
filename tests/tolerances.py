"""The one table of tolerances. Relative errors in float64, unless a test says otherwise."""

TOLERANCES: dict[str, float] = {
    # Two orders of the same sums: rounding, amplified by some tens of training steps.
    "exact_vs_autograd": 1e-10,
    # Central differences lose about 2/3 of the digits: h² truncation against ε/h rounding, best near h = 1e-5.
    "exact_vs_differences": 1e-6,
    # The same formula with dense matrices: rounding times the condition number of a damped solve, kept below 1e6.
    "approximate_vs_own_formula": 1e-8,
    # One step, one inner product: nothing but rounding.
    "adjointness": 1e-12,
}
