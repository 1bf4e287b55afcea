"""Pipeline parallelism: schedules as tables, a validator, a simulator and one executor."""

from .executor import execute
from .schedule import Schedule
from .simulator import Timeline, simulate
from .tables import Action, Costs

__all__ = ["Action", "Costs", "Schedule", "Timeline", "execute", "simulate"]
