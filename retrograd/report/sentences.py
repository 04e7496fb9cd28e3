"""What a check found, in plain words: the same sentences on the page and on the command line."""

from retrograd.attribution import Agreement, Check


def size_of_changes(slope: Agreement) -> str:
    """Say whether predicted changes have the right size.

    Args:
        slope: of actual against predicted change.
    """
    return (
        f"One unit of predicted change went with {slope.value:.3g} [{slope.low:.3g}, {slope.high:.3g}] units of actual change; "
        "1 is the right size."
    )


def ceilings(check: Check) -> list[str]:
    """Say what no prediction could have passed, a sentence for each ceiling that the retrainings show.

    Args:
        check: predictions beside outcomes.
    """
    says = {
        "additive": "No sum of one number for each example could pass r = {:.2f}.",
        "noise": f"No prediction could pass a rank correlation of {{:.2f}}: the truth is a mean over only {check.seeds} seeds.",
        "one seed": "Knowing one seed’s own outcomes exactly would get a rank correlation of {:.2f}.",
    }
    return [sentence.format(check.ceilings[name]) for name, sentence in says.items() if name in check.ceilings]
