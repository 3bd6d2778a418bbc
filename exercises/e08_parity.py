"""E8: parity. When will bytes cost nothing, and who can know?

    python -m pytest exercises -k e08              # level B, 75 minutes

The paper's headline is a number that nobody has trained to: the budget at which bytes reach BPE.
The test reads the published IsoFLOP minima of this repository, up to 3e14 FLOPs. What do they say?

(a) Write `gap`: G(C) = C_byte / C. At C FLOPs BPE has a loss; bytes reach this loss at C_byte.
    Nothing is extrapolated.
(b) Write `frontier`: a law L(C) = E + K C^-gamma for a given E. E is the loss that remains however
    much is computed, the entropy of the text. With one E for both, bytes reach BPE only if their
    gamma is larger, and then at C = (K_byte / K_bpe)^(1 / (gamma_byte - gamma_bpe)).
(c) E is not measured. Write `entropy`, which chooses it by the fit: for each curve alone, or one E
    for all curves.

Read first: scaling.fit_minima. Leave scaling.compute_to_reach for later: it is close to (a), and
the test turns it off.

Afterwards: print the parity of MDM, too, and that of AR for a few E; if gamma of bytes is not the
larger one, it is never. Do the same for some of the samples in Fit.minima (E = 0). The minima are

    rows = scaling.read_rows(Path("results/runs.csv"))
    fits = scaling.fit_minima([row for row in rows if scaling.by_the_rules(row)])

The paper has about 1e22 FLOPs for AR and 4e26 for MDM. Section 6 of results/README.md, which fits
the same runs in another way, has 1e22 for AR. What may one claim of parity? What of G? And can a
text have two entropies, as separate E say? (The grid goes from 0 to 1. Where is the E of BPE?)
"""
PREDICT = {
    "AR, E = 0 for both: log10 of the FLOPs at parity": None,
    "AR, the one E that fits all four curves best: how many decades later": None,
    "AR, an E for each curve: E of bytes - E of BPE, in bits per byte": None,
}
# Afterwards: one sentence for each, why it is so.
EXPLAIN = ["", "", ""]


def gap(C_byte, L_byte, C_bpe, L_bpe):
    """Return G at each budget of BPE, (K,): how many times its compute bytes need for its loss.

    C_byte, L_byte (J,): budgets and losses of bytes; C_bpe, L_bpe (K,): those of BPE. C rises and L
    falls. Between two budgets log L is a straight line in log C. inf where bytes do not reach the
    loss within their budgets. No loss of BPE is above their first one.
    """
    raise NotImplementedError


def frontier(C, L, E):
    """Return (K, gamma) of the law L = E + K C^-gamma through losses L (n,) at budgets C (n,).

    By least squares of ln(L - E), which is a straight line in ln C.
    """
    raise NotImplementedError


def entropy(curves, grid):
    """Return the E of the grid (m,) with which the laws of the curves fit best: a float.

    curves: a list of (C, L). Each has a K and a gamma of its own, by `frontier`; they share E. Best
    is the least sum of (E + K C^-gamma - L)^2, over all points of all curves. All E of the grid are
    below all L.
    """
    raise NotImplementedError
