"""Which keys a query sees, read off a mask's ops by algebra: no mask is computed.

A mask is boolean, or added to scores: 0 where a query sees a key and at most `BLOCKED` where it does not. Every value in it is an
affine function of its indices and of integers that are data, such as the positions of a cache; or a conjunction of clauses, each
a disjunction of bounds ``affine >= 0``; or such a condition as numbers. The bounds that remain tell the window and the sinks,
however they were spelled, at any length. `values` are these, `rules` make them of ops, `reader` of a graph, `window` finds the
window in them.
"""
