"""What a training step needs before anything is loaded: memory by role, work, and which settings fit."""

from inlay.plan.machine import Machine, calibrate, machine_named
from inlay.plan.planner import Plan, Planner
from inlay.plan.search import Fit, search
from inlay.plan.setting import ROLES, Memory, Setting
from inlay.plan.skeleton import Skeleton, read_config

__all__ = [
    "ROLES", "Fit", "Machine", "Memory", "Plan", "Planner", "Setting", "Skeleton",
    "calibrate", "machine_named", "read_config", "search",
]  # fmt: skip
