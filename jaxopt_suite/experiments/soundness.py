"""Finding the first step of a run that is not finite."""

from jaxopt_suite.experiments.peers import Peers
from jaxopt_suite.parallel.metrics import Metrics


class NonFinite(Exception):
    """A step whose loss, gradient or update is not finite."""

    def __init__(self, step: int, metrics: Metrics) -> None:
        super().__init__(step, metrics)
        self.step, self.metrics = step, metrics


class Lookout:
    """Looks at every step once, and has all processes of a run find the same one.

    Each looks at its own workers' numbers. What it has seen the others learn where they wait for
    one another anyway: asking at every step would make them wait at every step.
    """

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._steps: dict[int, Metrics] = {}  # since all agreed that everything was finite
        self._looked = 0  # the last step looked at
        self._found: int | None = None  # the first that is not finite, of this process's workers

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes in a step, and looks at those before, as looking at this one would wait for it.

        Raises:
          NonFinite: if one of them is not finite and this is the only process.
        """
        self._look()
        self._steps[step] = metrics
        if self._peers.count == 1:
            self._tell()

    def settle(self) -> None:
        """Looks at all steps taken in; the processes call it together.

        Raises:
          NonFinite: for the first step that is not finite on one of them.
        """
        self._look()
        self._tell()
        self._steps.clear()

    def _look(self) -> None:
        for step in [step for step in self._steps if step > self._looked]:
            self._looked = step
            if self._found is None and not self._steps[step].finite_here:
                self._found = step

    def _tell(self) -> None:
        found = [step for step in self._peers.gather(self._found) if step is not None]
        if found:
            raise NonFinite(min(found), self._steps[min(found)])
