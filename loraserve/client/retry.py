"""When a request is sent again, and after how long. Pure."""

from dataclasses import dataclass

from loraserve.errors import LoraServeError, ResourceExhaustedError, UnavailableError

# The field of errors that gRPC itself made: no server of ours said anything.
TRANSPORT_FIELD = "rpc"
# The field of a node's errors that are about one adapter: the node serves the others.
ADAPTER_FIELD = "adapter"


@dataclass(frozen=True)
class RetryPolicy:
    """Attempts include the first. An answer that goes on on another node is not a retry: it never
    repeats work that was paid for, so only `max_resumes` bounds it."""

    max_attempts: int = 3
    """In a row without a single token."""
    max_resumes: int = 2
    """Of one request: one that kills the nodes it runs on must not kill them all."""
    max_redirects: int = 3
    """Of one request, by nodes that do not hold its adapter any more; they cost next to nothing.
    The node that comes after them is to load the adapter."""
    budget_ratio: float = 0.1
    """Retries of refused requests per request, over all requests of a client."""
    budget_reserve: int = 10
    """Retries that are free at first, and saved up at most."""
    first_backoff_s: float = 0.05
    """Where the server named no time: the second attempt in a row follows at once, on another
    node; this long before the third, twice as long before the fourth and so on."""

    @property
    def most_attempts(self) -> int:
        """Of one request, whatever happens to it. The tokens of an answer come from 1 +
        `max_resumes` attempts at most; failures before the first token, redirects (the last is
        answered with an attempt that loads on demand) and a revision that a node finds gone are
        counted apart."""
        before_tokens = self.max_attempts - 1
        redirects = self.max_redirects + 1
        return before_tokens + redirects + 1 + (1 + self.max_resumes)


class RetryBudget:
    """Bounds what retries add to the load of nodes that are full already."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._ratio = policy.budget_ratio
        self._reserve = float(policy.budget_reserve)
        self._left = self._reserve

    def request(self) -> None:
        self._left = min(self._reserve, self._left + self._ratio)

    def take(self) -> bool:
        """Whether a retry is allowed; it is counted."""
        # Ten times a tenth is a little less than one.
        if self._left < 1.0 - 1e-9:
            return False
        self._left -= 1.0
        return True


def another_may(error: LoraServeError) -> bool:
    """Whether another node may cure it: this one is unreachable, draining, broken off, or cannot
    get the adapter."""
    if isinstance(error, UnavailableError):
        return True
    # A server that dies or is stopped shows itself as any of these, without a word of ours.
    return error.field == TRANSPORT_FIELD and error.code in ("INTERNAL", "CANCELLED")


def node_is_lost(error: LoraServeError) -> bool:
    """Whether nothing should be sent to the node for a while, whatever it is for."""
    return another_may(error) and error.field != ADAPTER_FIELD


class RetryState:
    """The attempts of one request."""

    def __init__(self, policy: RetryPolicy, budget: RetryBudget) -> None:
        self._policy = policy
        self._budget = budget
        self.attempt = 0
        self._fruitless = 0
        self._resumes = 0
        self._redirects = 0
        budget.request()

    def redirected(self) -> bool:
        """A node has sent the request elsewhere: no failure of it. Whether the next attempt may go
        by routes again; otherwise it is to be one that no node sends on."""
        self._redirects += 1
        self.attempt += 1
        return self._redirects <= self._policy.max_redirects

    def after(self, error: LoraServeError, progress: bool, started: bool) -> float | None:
        """Seconds to wait before the next attempt, None where there is none.

        `progress`: the failed attempt brought tokens. `started`: some attempt did.
        """
        full = isinstance(error, ResourceExhaustedError) and error.retry_after_s is not None
        self._fruitless = 0 if progress else self._fruitless + 1
        self._resumes += started
        if (
            not (another_may(error) or full)
            or self._fruitless >= self._policy.max_attempts
            or self._resumes > self._policy.max_resumes
        ):
            return None
        # A lost node gets no more requests, which bounds its retries; a full one is still asked.
        if full and not self._budget.take():
            return None
        self.attempt += 1
        if isinstance(error, ResourceExhaustedError) and error.retry_after_s is not None:
            return error.retry_after_s
        if self._fruitless <= 1:
            return 0.0
        return float(self._policy.first_backoff_s * 2 ** (self._fruitless - 2))
