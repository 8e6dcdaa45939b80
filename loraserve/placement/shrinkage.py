"""What few requests say of an adapter, and what its rank says: empirical Bayes.

Sorted by load, adapters that were merely lucky stand with those that are busy, and a node filled
with lucky ones is nearly idle a minute later. So counts and lengths are drawn to their rank's:

- Requests per window are Poisson around rates that follow a Gamma distribution over the adapters of
  a rank; its shape comes from the moments, the rate is the posterior mean (Robbins 1956; Efron and
  Morris 1975). Where all adapters are alike, their rate is that of all; where few have nearly
  everything, what was counted.
- Mean tokens of a request, between the adapter's own and its rank's.
"""

import numpy as np

from loraserve.placement.arrays import Floats, Ints

# So many requests of an adapter count as much as its rank, for the length of requests.
LENGTH_PRIOR = 10.0
# Less of an adapter than this is nothing.
LEAST = 1e-6
# Shapes beyond say the same: all alike.
MOST_ALIKE = 1e6


def shrunk(tokens: Floats, requests: Floats, seen: Floats, group: Ints) -> Floats:
    """[adapters]: factors on `tokens`, which keep their sum over each group nearly as it is.

    `requests` per window, smoothed; `seen`: requests that this rests on. Adapters without requests
    keep their tokens."""
    factor = np.ones(len(tokens))
    counted = np.flatnonzero((requests > LEAST) & (seen > LEAST) & (tokens > LEAST))
    if not len(counted):
        return factor
    tokens, requests, seen = tokens[counted], requests[counted], seen[counted]
    _, group = np.unique(group[counted], return_inverse=True)
    count = np.bincount(group)
    windows = seen / requests
    mean = np.bincount(group, requests) / count
    variance = np.bincount(group, (requests - mean[group]) ** 2) / count
    chance = np.bincount(group, requests / windows) / count
    spread = np.maximum(variance - chance, mean**2 / MOST_ALIKE)
    shape = (mean**2 / spread)[group]
    rate = (seen + shape) / (windows + shape / mean[group])
    own = tokens / requests
    usual = (np.bincount(group, tokens) / np.bincount(group, requests))[group]
    length = (seen * own + LENGTH_PRIOR * usual) / (seen + LENGTH_PRIOR)
    factor[counted] = rate * length / tokens
    return factor
