"""Settings: frozen, keyword-only, validated where they are made. All defaults stand here and nowhere else.

Units are in the names: `_mb` is 1024 x 1024 bytes, times are seconds. The library reads no environment and no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Final, Literal, TypedDict

from agentpool.errors import SettingsError

if TYPE_CHECKING:
    from os import PathLike

    from agentpool.core.retry import RetryLike

__all__ = ["MB", "BreakerSettings", "CpuPolicy", "HostBudget", "PoolOptions", "PoolSettings", "Scope", "TaskOptions",
           "TaskOptionsDict"]

MB: Final = 1024 * 1024

DEFAULT_MAX_WORKERS: Final = 4
DEFAULT_MEMORY_LIMIT_MB: Final = 100.0
#: Queue bound of `get_agent_pool()`, the orchestrator and `agentpool run`: none of them has a caller that watches a
#: queue grow.
DEFAULT_MAX_PENDING: Final = 1_000
#: A queue longer than this shows in the health report, whatever `max_pending` says.
LONG_QUEUE: Final = 10_000
#: Attempts for a lost worker that an agent kind declared `idempotent` gets without asking.
IDEMPOTENT_ATTEMPTS: Final = 3
#: A session that nobody uses for so many seconds is lost: others may want its worker.
DEFAULT_SESSION_IDLE_TIMEOUT: Final = 300.0
#: A task that killed this many workers is quarantined.
QUARANTINE_AFTER: Final = 3

#: A host's budget has no more agents than this.
MOST_SLOTS: Final = 4096
#: No setting is larger: 30,000 years, or more memory than any machine has.
_LARGEST: Final = 1e12

#: Names of levels, as the standard `logging` has them.
LEVELS: Final = {"DEBUG": 10, "INFO": 20, "WARNING": 30, "ERROR": 40, "CRITICAL": 50}

CpuPolicy = Literal["report", "throttle"]
StartMethod = Literal["fork", "spawn"]
MemoryMetric = Literal["rss", "pss", "uss"]
Victim = Literal["task", "tool"]
Scope = Literal["pool", "host"]


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise SettingsError(message)


def _check_env(env: object) -> None:
    """Raises SettingsError for what no process can have as its environment."""
    if env is None:
        return
    _check(isinstance(env, Mapping), f"env must map names to strings, got {env!r}")
    assert isinstance(env, Mapping)
    _check(all(type(name) is str and type(value) is str for name, value in env.items()),
           "env must map names to strings, and one of its names or values is none")
    for name, value in env.items():
        _check(name != "" and "=" not in name and "\0" not in name,
               f"env: {name!r} cannot be the name of a variable: it is empty, or has '=' or a NUL in it")
        _check("\0" not in value, f"env: the value of {name} has a NUL in it, which no environment can hold")


def _positive(name: str, value: float | None, *, zero: bool = False, none: bool = False) -> None:
    if value is None and none:
        return
    least = "zero or more" if zero else "greater than 0"
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    _check(is_number, f"{name} must be a number, {least}{' (or None)' if none else ''}, got {value!r}")
    assert value is not None
    _check(value >= 0 if zero else value > 0, f"{name} must be {least}, got {value!r}")
    cure = "; for no limit, say None" if none else ""
    _check(value <= _LARGEST, f"{name} must be finite and at most {_LARGEST:g}, got {value!r:.40}{cure}")


def _whole(name: str, value: int | None, *, least: int, none: bool = False) -> None:
    if value is None and none:
        return
    _check(isinstance(value, int) and not isinstance(value, bool), f"{name} must be a whole number, got {value!r}")
    assert value is not None
    words = "greater than 0" if least == 1 else f"at least {least}"
    _check(value >= least, f"{name} must be {words}, got {value}")


def _hard_above_soft(hard_mb: float | None, soft_mb: float | None) -> None:
    _check(
        hard_mb is None or soft_mb is None or hard_mb >= soft_mb,
        f"hard_memory_limit_mb ({hard_mb}) is below memory_limit_mb ({soft_mb}): every task would be stopped before "
        "its worker could be recycled; raise the hard limit or lower memory_limit_mb",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerSettings:
    """The circuit breaker in front of the spawn path.

    `failure_threshold` failed starts within `window_seconds` open it. After `open_seconds` it lets one probe start
    (half-open); each failed probe doubles the wait, up to `max_open_seconds`.
    """

    failure_threshold: int = 5
    window_seconds: float = 60.0
    open_seconds: float = 30.0
    max_open_seconds: float = 300.0

    def __post_init__(self) -> None:
        _whole("failure_threshold", self.failure_threshold, least=1)
        _positive("window_seconds", self.window_seconds)
        _positive("open_seconds", self.open_seconds)
        _positive("max_open_seconds", self.max_open_seconds)
        _check(
            self.max_open_seconds >= self.open_seconds,
            f"max_open_seconds ({self.max_open_seconds}) must not be below open_seconds ({self.open_seconds})",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HostBudget:
    """What all pools of this user with `scope="host"` may use together.

    agents: tasks that run at once, whichever pool runs them. memory_mb: memory of all these pools' workers above which
    no further task starts anywhere while another one runs; None: not limited. What a task is expected to need counts
    as if it used it already. directory: where the pools meet, private to the user; None: `/tmp/agentpool-UID/budget`.
    Pools with different budgets share the slots that both have: the greater one may fill the rest.
    """

    agents: int = 2
    memory_mb: float | None = 800.0
    directory: str | None = None

    def __post_init__(self) -> None:
        _whole("agents of the host's budget", self.agents, least=1)
        _check(self.agents <= MOST_SLOTS,
               f"agents of the host's budget must be at most {MOST_SLOTS}, got {self.agents}")
        _positive("memory_mb of the host's budget", self.memory_mb, none=True)
        _check(self.directory is None or (isinstance(self.directory, str) and self.directory.startswith("/")),
               f"directory of the host's budget must be an absolute path, got {self.directory!r}")


class PoolOptions(TypedDict, total=False):
    """The keyword settings of `AgentPool`; see `PoolSettings` for meaning, units and defaults."""

    max_concurrent: int | None
    min_workers: int
    max_pending: int | None
    memory_limit_mb: float | None
    memory_growth_mb: float | None
    hard_memory_limit_mb: float | None
    idle_timeout: float | None
    cleanup_interval: float
    alert_memory_mb: float | None
    critical_memory_mb: float | None
    cpu_threshold_percent: float
    cpu_policy: CpuPolicy
    min_available_mb: float | None
    pressure_threshold: float
    task_timeout: float | None
    queue_timeout: float | None
    retry: RetryLike
    start_timeout: float
    kill_grace: float
    preload: tuple[str, ...]
    breaker: BreakerSettings
    start_method: StartMethod
    memory_metric: MemoryMetric
    env: Mapping[str, str] | None
    env_allow: tuple[str, ...] | None
    cwd: str | None
    core_dumps: bool
    data_limit_mb: float | None
    control: bool | str | PathLike[str]
    scope: Scope
    budget: HostBudget | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """What one pool promises. Every field is a keyword of `AgentPool`.

    max_workers: pooled worker processes at most.
    max_concurrent: tasks that run at once: 2, or `max_workers` where that alone is given to `AgentPool`.
    min_workers: idle workers are kept down to this number, and started ahead of work.
    max_pending: queue bound; None: none.
    memory_limit_mb: a worker whose tree's RSS is above this after a task is recycled; None: never.
    memory_growth_mb: the same, counted from the fresh worker's baseline.
    hard_memory_limit_mb: a running task whose worker tree passes this is stopped with `MemoryLimitError`.
    idle_timeout: seconds after which an idle worker is recycled; None: never.
    cleanup_interval: seconds between full sweeps at the slowest.
    max_tasks_per_child: recycle a worker after this many tasks.
    alert_memory_mb, critical_memory_mb: thresholds for all workers' trees together; None: 1.25 and 2 times
        `max_workers` x `memory_limit_mb`, moved where the other one was given and is in the way. Above a critical
        value that you set, the biggest running task is stopped; above a derived one only when the host is short too.
    cpu_threshold_percent: host CPU above this, sustained, degrades the pool.
    cpu_policy: "report", or "throttle" to start no worker while others than this pool use the CPU.
    min_available_mb: below this much available memory the breaker opens; None: 5 % of the host's or container's.
    pressure_threshold: memory pressure (PSI some avg10, percent) above this counts as too little memory.
    task_timeout: seconds a task may run; queue_timeout: seconds it may wait.
    retry: see `agentpool.core.retry.compile_policy`.
    start_timeout: seconds from fork to ready, preload and initializer included.
    kill_grace: seconds between asking a task to stop and killing its worker.
    preload: modules that the keeper imports once, before it forks workers.
    breaker: see `BreakerSettings`.
    start_method: "fork" (by the keeper) or "spawn" (a fresh interpreter per worker, started by the keeper).
    memory_metric: what is counted against the limits, summed over a worker's process tree: "rss" (shared pages count in
        each process), "pss" (a shared page is divided among those who share it) or "uss" (only what nobody shares).
    env: environment variables that workers get beside this process's own, or instead of them.
    env_allow: names, or patterns as `fnmatch` has them, of this process's variables that workers may see; None: all.
        Everything else, secrets included, is withheld; `env` is added afterwards.
    cwd: working directory of workers; None: this process's when the pool starts its first worker.
    core_dumps: whether a crashing worker may write one, as far as this process's limits allow.
    data_limit_mb: RLIMIT_DATA of each worker and of each process that its task starts. The kernel holds it exactly, at
        the instant of the allocation: a Python task gets a MemoryError. It counts what is allocated, touched or not, so
        that programs that reserve much and use little break under it: None, the default, sets none.
    control: whether the pool can be operated by this user's other processes (`agentpool ps`, `top`, ...) through a
        socket that it opens 50 ms after its first task; a path: the folder for it, in place of
        $XDG_RUNTIME_DIR/agentpool or /tmp/agentpool-UID. A pool that can have no socket works without.
    scope: "pool": this pool's limits are all there is. "host": all pools of this user with that scope share one budget
        of running tasks and of memory, and wait for their turn.
    budget: that budget, see `HostBudget`; given, the scope is "host".
    """

    max_workers: int = DEFAULT_MAX_WORKERS
    max_concurrent: int | None = 2
    min_workers: int = 0
    max_pending: int | None = None
    memory_limit_mb: float | None = DEFAULT_MEMORY_LIMIT_MB
    memory_growth_mb: float | None = None
    hard_memory_limit_mb: float | None = None
    idle_timeout: float | None = 300.0
    cleanup_interval: float = 60.0
    max_tasks_per_child: int | None = None
    alert_memory_mb: float | None = None
    critical_memory_mb: float | None = None
    cpu_threshold_percent: float = 80.0
    cpu_policy: CpuPolicy = "report"
    min_available_mb: float | None = None
    pressure_threshold: float = 60.0
    task_timeout: float | None = None
    queue_timeout: float | None = None
    retry: RetryLike = None
    start_timeout: float = 60.0
    kill_grace: float = 2.0
    preload: tuple[str, ...] = ()
    breaker: BreakerSettings = field(default_factory=BreakerSettings)
    start_method: StartMethod = "fork"
    memory_metric: MemoryMetric = "rss"
    env: Mapping[str, str] | None = None
    env_allow: tuple[str, ...] | None = None
    cwd: str | None = None
    core_dumps: bool = False
    data_limit_mb: float | None = None
    control: bool | str = True
    scope: Scope = "pool"
    budget: HostBudget | None = None

    def __post_init__(self) -> None:
        _whole("max_workers", self.max_workers, least=1)
        _whole("max_concurrent", self.max_concurrent, least=1, none=True)
        _whole("min_workers", self.min_workers, least=0)
        _whole("max_pending", self.max_pending, least=1, none=True)
        _whole("max_tasks_per_child", self.max_tasks_per_child, least=1, none=True)
        for name in ("memory_limit_mb", "memory_growth_mb", "hard_memory_limit_mb", "idle_timeout", "alert_memory_mb",
                     "critical_memory_mb", "task_timeout", "queue_timeout", "data_limit_mb"):
            _positive(name, getattr(self, name), none=True)
        for name in ("cleanup_interval", "cpu_threshold_percent", "pressure_threshold", "start_timeout"):
            _positive(name, getattr(self, name))
        _positive("min_available_mb", self.min_available_mb, zero=True, none=True)
        _positive("kill_grace", self.kill_grace, zero=True)
        _check(self.cpu_policy in ("report", "throttle"),
               f"cpu_policy must be 'report' or 'throttle', got {self.cpu_policy!r}")
        _check(self.start_method in ("fork", "spawn"),
               f"start_method must be 'fork' or 'spawn', got {self.start_method!r}")
        _check(self.memory_metric in ("rss", "pss", "uss"),
               f"memory_metric must be 'rss', 'pss' or 'uss', got {self.memory_metric!r}")
        _check(isinstance(self.preload, tuple) and all(isinstance(name, str) for name in self.preload),
               f"preload must be a sequence of module names, got {self.preload!r}")
        _check_env(self.env)
        _check(self.env_allow is None or (isinstance(self.env_allow, tuple) and
                                          all(isinstance(name, str) for name in self.env_allow)),
               f"env_allow must be a sequence of names or patterns, got {self.env_allow!r}")
        _check(self.cwd is None or (isinstance(self.cwd, str) and "\0" not in self.cwd),
               f"cwd must be a path as a string, got {self.cwd!r}")
        _check(isinstance(self.core_dumps, bool), f"core_dumps must be True or False, got {self.core_dumps!r}")
        _check(isinstance(self.control, bool) or (isinstance(self.control, str) and self.control != "" and
                                                  "\0" not in self.control),
               f"control must be True, False or the path of a folder, got {self.control!r}")
        _check(isinstance(self.breaker, BreakerSettings),
               f"breaker must be a BreakerSettings(...), got {self.breaker!r}")
        self._check_scope()
        self._check_together()

    def _check_scope(self) -> None:
        _check(self.scope in ("pool", "host"), f"scope must be 'pool' or 'host', got {self.scope!r}")
        _check(self.budget is None or isinstance(self.budget, HostBudget),
               f"budget must be a HostBudget(...), got {self.budget!r}")
        _check(self.budget is None or self.scope == "host",
               "a budget is shared by the pools of scope='host', and this one has scope='pool': leave one of them out")
        if self.scope == "host" and self.budget is None:
            object.__setattr__(self, "budget", HostBudget())

    def _check_together(self) -> None:
        _check(self.min_workers <= self.max_workers,
               f"min_workers ({self.min_workers}) is above max_workers ({self.max_workers}): lower it, or raise that")
        _check(self.max_concurrent is None or self.max_concurrent <= self.max_workers,
               f"max_concurrent ({self.max_concurrent}) is above max_workers ({self.max_workers}): a task needs a "
               "worker of its own; raise max_workers or lower max_concurrent")
        _hard_above_soft(self.hard_memory_limit_mb, self.memory_limit_mb)
        alert, critical = self.alert_memory_mb, self.critical_memory_mb
        _check(alert is None or critical is None or alert <= critical,
               f"alert_memory_mb ({alert}) is above critical_memory_mb ({critical}); an alert comes first: lower it, "
               "or raise the other")

    @property
    def concurrency(self) -> int:
        """Tasks that run at once."""
        return self.max_workers if self.max_concurrent is None else self.max_concurrent

    @property
    def alert_bytes(self) -> int | None:
        """Pool memory above which the pool is degraded; None: no limit is set to derive it from."""
        if self.alert_memory_mb is not None:
            return int(self.alert_memory_mb * MB)
        derived, critical = self._derived(1.25), self.critical_memory_mb
        return derived if derived is None or critical is None else min(derived, int(critical * MB))

    @property
    def critical_bytes(self) -> int | None:
        """Pool memory above which the breaker opens; None: no limit is set to derive it from."""
        if self.critical_memory_mb is not None:
            return int(self.critical_memory_mb * MB)
        derived, alert = self._derived(2.0), self.alert_memory_mb
        return derived if derived is None or alert is None else max(derived, int(alert * MB))

    def _derived(self, factor: float) -> int | None:
        return None if self.memory_limit_mb is None else int(factor * self.max_workers * self.memory_limit_mb * MB)

    @classmethod
    def make(cls, max_workers: int | None = None, **given: Any) -> PoolSettings:
        """Settings from keywords as `AgentPool` takes them.

        A default gives way to what was given: `max_concurrent` follows `max_workers` where that alone is given,
        `max_workers` follows a greater `max_concurrent` or `min_workers`, `memory_limit_mb` a lower
        `hard_memory_limit_mb`. Raises SettingsError for an unknown name.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(given) - known):
            raise SettingsError(f"unknown setting {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        if given.get("max_concurrent", 0) is None:
            del given["max_concurrent"]
        if max_workers is not None:
            given["max_workers"] = max_workers
            given.setdefault("max_concurrent", None)
        else:
            asked = [given[name] for name in ("max_concurrent", "min_workers") if isinstance(given.get(name), int)]
            given["max_workers"] = max([DEFAULT_MAX_WORKERS, *asked])
        hard_mb = given.get("hard_memory_limit_mb")
        if isinstance(hard_mb, (int, float)) and 0 < hard_mb < DEFAULT_MEMORY_LIMIT_MB:
            given.setdefault("memory_limit_mb", hard_mb)
        if hasattr(given.get("control"), "__fspath__"):
            given["control"] = given["control"].__fspath__()
        if given.get("budget") is not None:
            given.setdefault("scope", "host")
        for name in ("preload", "env_allow"):
            if isinstance(given.get(name), (list, set, frozenset)):
                given[name] = tuple(given[name])
        return cls(**given)


def check_session(key: str | None, idle_timeout: float | None) -> None:
    """Raises SettingsError for what `pool.session()` does not take."""
    _check(key is None or (isinstance(key, str) and key != ""), f"key must be a string that is not empty, got {key!r}")
    _positive("idle_timeout", idle_timeout, none=True)


class TaskOptionsDict(TypedDict, total=False):
    """The keywords of `pool.options(...)`; see `TaskOptions`."""

    timeout: float | None
    queue_timeout: float | None
    retry: RetryLike
    priority: int
    key: str | None
    memory_limit_mb: float | None
    hard_memory_limit_mb: float | None
    name: str | None
    block: bool
    victim: Victim
    memory_growth_mb: float | None
    expected_memory_mb: float | None
    group: str | None
    group_limit: int | None
    capture_output: bool
    capture_logging: int | str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """What one task asks for. An option that is not given is the pool's; None means no limit.

    timeout: seconds it may run. queue_timeout: seconds it may wait in the queue, retries' waits not counted.
    retry: attempts for a lost worker (a whole number), or a tenacity policy.
    priority: higher goes first; 0 by default; equal ones in order of submission.
    key: tasks with the same key prefer the worker that ran the last one.
    memory_limit_mb, hard_memory_limit_mb: as in `PoolSettings`, for this task; None: as the pool says.
    name: shown in reports. block: whether `submit` waits for room where `max_pending` is set.
    victim: what is stopped when the worker's tree passes the hard limit: "task", or "tool": the biggest process that
        the task started, while there is one, so that the task goes on with the error that its tool gives it.
    memory_growth_mb: the worker that ran the task is recycled when it has grown by more than this over its warm
        baseline: the first reading after its first such task, set up agents included. Stands for the pool's limits,
        where `memory_limit_mb` is not given as well.
    expected_memory_mb: what the worker's process tree is expected to use while it runs the task. It is reserved: the
        task begins when so much is available, less `min_available_mb` and what others were promised and use not yet.
    group, group_limit: of all tasks of this group no more than so many run at once; others overtake those that wait.
        Each waits by its own limit, where those of one group differ.
    capture_output: what the task, C code in it and processes that it starts write to standard output and error comes
        as `Output` events of its future, and goes nowhere else.
    capture_logging: what it logs with the standard `logging` at this level or above ("INFO", or a number) comes as
        `Log` events. None: nothing does.
    """

    timeout: float | None = None
    queue_timeout: float | None = None
    retry: RetryLike = None
    priority: int = 0
    key: str | None = None
    memory_limit_mb: float | None = None
    hard_memory_limit_mb: float | None = None
    name: str | None = None
    block: bool = True
    victim: Victim = "task"
    memory_growth_mb: float | None = None
    expected_memory_mb: float | None = None
    group: str | None = None
    group_limit: int | None = None
    capture_output: bool = False
    capture_logging: int | str | None = None

    def __post_init__(self) -> None:
        for name in ("timeout", "queue_timeout", "memory_limit_mb", "hard_memory_limit_mb", "memory_growth_mb",
                     "expected_memory_mb"):
            _positive(name, getattr(self, name), none=True)
        _hard_above_soft(self.hard_memory_limit_mb, self.memory_limit_mb)
        expected, hard = self.expected_memory_mb, self.hard_memory_limit_mb
        _check(expected is None or hard is None or expected <= hard,
               f"expected_memory_mb ({expected}) is above hard_memory_limit_mb ({hard}), at which the task would be "
               "stopped; expect less, or raise the limit")
        _check(self.group is None or (isinstance(self.group, str) and self.group != ""),
               f"group must be a string that is not empty, got {self.group!r}")
        _whole("group_limit", self.group_limit, least=1, none=True)
        _check(self.group_limit is None or self.group is not None,
               f"group_limit ({self.group_limit}) needs a group to count: options(group=..., group_limit=...)")
        _check(isinstance(self.priority, int) and not isinstance(self.priority, bool),
               f"priority must be a whole number, got {self.priority!r}")
        _check(self.key is None or isinstance(self.key, str), f"key must be a string, got {self.key!r}")
        _check(self.name is None or isinstance(self.name, str), f"name must be a string, got {self.name!r}")
        _check(self.victim in ("task", "tool"), f"victim must be 'task' or 'tool', got {self.victim!r}")
        _check(isinstance(self.capture_output, bool),
               f"capture_output must be True or False, got {self.capture_output!r}")
        _check(self.capture_logging is None or self.logging_level is not None,
               f"capture_logging must be None, a level's number or one of {', '.join(LEVELS)}, got "
               f"{self.capture_logging!r}")
        _check(isinstance(self.block, bool), f"block must be True or False, got {self.block!r}")

    @property
    def captured(self) -> tuple[bool, int | None] | None:
        """Whether what the task writes is wanted, and from which level on what it logs; None: neither."""
        return (self.capture_output, self.logging_level) if self.capture_output or self.capture_logging is not None \
            else None

    @property
    def logging_level(self) -> int | None:
        """The level from which on the task's logging is captured, as a number."""
        level = self.capture_logging
        if isinstance(level, str):
            return LEVELS.get(level.upper())
        return level if type(level) is int and level >= 0 else None

    def updated(self, given: Mapping[str, Any]) -> TaskOptions:
        """These options with some replaced. Raises SettingsError for an unknown name."""
        known = {f.name for f in fields(self)}
        if unknown := sorted(set(given) - known):
            raise SettingsError(f"unknown option {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return replace(self, **given)
