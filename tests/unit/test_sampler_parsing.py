"""How the files of /proc and /sys/fs/cgroup are understood, on trees as recorded from hosts and containers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import pytest

from agentpool.io.host import CgroupLevel, HostSampler, MemoryBound, busy_percent, cgroup_levels, memory_bounds

MIB = 1024 * 1024
#: Below every host's memory, so that the limits of the trees are the tighter ones.
SMALL = 64 * MIB
#: What v1 shows where no limit is set: 2**63 - 1, rounded down to pages of 4 and of 64 KiB.
NO_LIMIT_4K = 9223372036854771712
NO_LIMIT_64K = 9223372036854710272

V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNTS = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:14 - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
"""
HYBRID_MOUNTS = V1_MOUNTS + "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
V1_PLACE = "9:name=systemd:/\n4:memory:{path}\n2:cpu,cpuacct:/\n"

Tree = Callable[..., tuple[str, str]]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Writes /proc and /sys/fs/cgroup as given; says where they are."""

    def write(place: str | None, mounts: str | None, cgroup: Mapping[str, str],
              proc: Mapping[str, str] | None = None) -> tuple[str, str]:
        files = {f"cgroup/{name}": text for name, text in cgroup.items()}
        files |= {f"proc/{name}": text for name, text in (proc or {}).items()}
        if place is not None:
            files["proc/self/cgroup"] = place
        if mounts is not None:
            files["proc/self/mountinfo"] = mounts
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return str(tmp_path / "proc"), str(tmp_path / "cgroup")

    return write


def v2(folder: str, limit: str, used: int, inactive_file: int = 0, **other: str) -> dict[str, str]:
    prefix = f"{folder}/" if folder else ""
    stat = f"anon {used}\nfile 8192\ninactive_anon 4096\nactive_file 4096\ninactive_file {inactive_file}\nslab 0\n"
    files = {"memory.max": limit, "memory.high": "max", "memory.current": str(used), "memory.stat": stat}
    files |= {f"memory.{name}": text for name, text in other.items()}
    return {f"{prefix}{name}": f"{text}\n" for name, text in files.items()}


def v1(folder: str, limit: int, used: int, inactive_file: int = 0, *, hierarchical: int | None = None,
       use_hierarchy: int = 1) -> dict[str, str]:
    stat = (f"cache 0\nrss {used}\ninactive_file 1\nhierarchical_memory_limit {hierarchical or limit}\n"
            f"hierarchical_memsw_limit {NO_LIMIT_4K}\ntotal_cache 0\ntotal_inactive_file {inactive_file}\n")
    files = {"limit_in_bytes": limit, "usage_in_bytes": used, "use_hierarchy": use_hierarchy, "stat": stat}
    return {f"memory{folder}/memory.{name}": f"{text}\n" for name, text in files.items()}


def bounds(roots: tuple[str, str]) -> list[MemoryBound]:
    return list(memory_bounds(cgroup_levels(*roots)))


def names(roots: tuple[str, str]) -> list[tuple[int, str]]:
    return [(level.version, level.name) for level in cgroup_levels(*roots)]


# v2


def test_v2_service_is_bound_by_its_own_limit(tree: Tree) -> None:
    cgroup = {"cgroup.controllers": "memory\n", **v2("system.slice", "max", 5 * MIB),
              **v2("system.slice/a.service", str(SMALL), 20 * MIB)}
    roots = tree("0::/system.slice/a.service\n", V2_MOUNT, cgroup)
    assert bounds(roots) == [MemoryBound(SMALL, 44 * MIB, "cgroup v2 /system.slice/a.service")]
    assert names(roots) == [(2, "/system.slice/a.service"), (2, "/system.slice"), (2, "/")]


def test_v2_container_with_a_namespace_of_its_own_has_its_limit_at_the_root(tree: Tree) -> None:
    roots = tree("0::/\n", V2_MOUNT, v2("", str(SMALL), 20 * MIB))
    assert bounds(roots) == [MemoryBound(SMALL, 44 * MIB, "cgroup v2 /")]


def test_v2_mount_of_a_part_of_the_hierarchy_is_joined_where_the_part_begins(tree: Tree) -> None:
    mount = V2_MOUNT.replace(" / /sys", " /docker/abc /sys")
    cgroup = {**v2("", str(SMALL), 20 * MIB), **v2("jobs", "max", 10 * MIB)}
    roots = tree("0::/docker/abc/jobs\n", mount, cgroup)
    assert names(roots) == [(2, "/docker/abc/jobs"), (2, "/docker/abc")]
    assert bounds(roots) == [MemoryBound(SMALL, 44 * MIB, "cgroup v2 /docker/abc")]


def test_inactive_file_pages_count_as_available(tree: Tree) -> None:
    roots = tree("0::/a\n", V2_MOUNT, v2("a", str(SMALL), 60 * MIB, inactive_file=50 * MIB))
    assert bounds(roots)[0].available_bytes == 54 * MIB


def test_more_cache_than_usage_leaves_the_limit_and_not_more(tree: Tree) -> None:
    # The two figures are not read at the same instant.
    roots = tree("0::/a\n", V2_MOUNT, v2("a", str(SMALL), 10 * MIB, inactive_file=11 * MIB))
    assert bounds(roots)[0].available_bytes == SMALL


def test_usage_above_the_limit_leaves_nothing(tree: Tree) -> None:
    roots = tree("0::/a\n", V2_MOUNT, v2("a", str(SMALL), 70 * MIB))
    assert bounds(roots)[0].available_bytes == 0


def test_the_tightest_level_counts_even_when_its_limit_is_the_larger(tree: Tree) -> None:
    cgroup = {**v2("pod", str(2 * SMALL), 2 * SMALL - 3 * MIB), **v2("pod/mine", str(SMALL), MIB)}
    reading = HostSampler(*tree("0::/pod/mine\n", V2_MOUNT, cgroup)).read()
    assert reading.available_bytes == 3 * MIB, "siblings in the pod used the rest"
    assert reading.limit_source == "cgroup v2 /pod"
    assert reading.total_bytes == SMALL, "more than the smallest limit can never be had"


def test_memory_high_counts_as_a_limit_where_it_is_the_lower(tree: Tree) -> None:
    roots = tree("0::/a\n", V2_MOUNT, v2("a", str(SMALL), 10 * MIB, high=str(32 * MIB)))
    assert bounds(roots) == [MemoryBound(32 * MIB, 22 * MIB, "cgroup v2 /a (memory.high)")]


def test_max_everywhere_binds_nothing(tree: Tree) -> None:
    roots = tree("0::/a/b\n", V2_MOUNT, {**v2("a", "max", MIB), **v2("a/b", "max", MIB)})
    assert bounds(roots) == []


# v1


def test_v1_on_the_host_walks_to_the_root(tree: Tree) -> None:
    cgroup = {**v1("", NO_LIMIT_4K, 900 * MIB), **v1("/jobs", SMALL, 30 * MIB, 10 * MIB),
              **v1("/jobs/one", NO_LIMIT_4K, 5 * MIB, hierarchical=SMALL)}
    roots = tree(V1_PLACE.format(path="/jobs/one"), V1_MOUNTS, cgroup)
    assert names(roots) == [(1, "/jobs/one"), (1, "/jobs"), (1, "/")]
    assert bounds(roots) == [MemoryBound(SMALL, 59 * MIB, "cgroup v1 /jobs/one"),
                             MemoryBound(SMALL, 44 * MIB, "cgroup v1 /jobs")]


@pytest.mark.parametrize("no_limit", [NO_LIMIT_4K, NO_LIMIT_64K])
def test_v1_writes_no_limit_as_a_huge_number(tree: Tree, no_limit: int) -> None:
    cgroup = {**v1("", no_limit, 900 * MIB), **v1("/jobs", no_limit, 30 * MIB)}
    assert bounds(tree(V1_PLACE.format(path="/jobs"), V1_MOUNTS, cgroup)) == []


def test_v1_container_sees_only_its_own_cgroup_mounted(tree: Tree) -> None:
    mounts = V1_MOUNTS.replace("0:32 / ", "0:32 /docker/abc ")
    roots = tree(V1_PLACE.format(path="/docker/abc"), mounts, v1("", SMALL, 20 * MIB))
    assert bounds(roots) == [MemoryBound(SMALL, 44 * MIB, "cgroup v1 /docker/abc")]


def test_v1_container_is_bound_by_a_pod_that_it_cannot_see(tree: Tree) -> None:
    mounts = V1_MOUNTS.replace("0:32 / ", "0:32 /pod/abc ")
    roots = tree(V1_PLACE.format(path="/pod/abc"), mounts, v1("", NO_LIMIT_4K, 20 * MIB, hierarchical=SMALL))
    assert bounds(roots) == [MemoryBound(SMALL, 44 * MIB, "cgroup v1 /pod/abc")]


def test_v1_without_hierarchy_a_cgroup_does_not_bind_what_is_below(tree: Tree) -> None:
    cgroup = {**v1("/jobs", MIB, 0, use_hierarchy=0), **v1("/jobs/one", SMALL, 20 * MIB, use_hierarchy=0)}
    roots = tree(V1_PLACE.format(path="/jobs/one"), V1_MOUNTS, cgroup)
    assert [bound.source for bound in bounds(roots)] == ["cgroup v1 /jobs/one"]


# hybrid


def test_hybrid_takes_memory_from_v1_and_pressure_from_v2(tree: Tree) -> None:
    place = "4:memory:/process_api/93\n1:cpu:/\n0::/group\n"
    cgroup = {**v1("", NO_LIMIT_4K, 900 * MIB), **v1("/process_api", NO_LIMIT_4K, 800 * MIB),
              **v1("/process_api/93", SMALL, 20 * MIB), "unified/cgroup.controllers": "hugetlb\n",
              "unified/group/memory.pressure": "some avg10=7.50 avg60=0.00 avg300=0.00 total=9\n"}
    roots = tree(place, HYBRID_MOUNTS, cgroup)
    assert names(roots) == [(1, "/process_api/93"), (1, "/process_api"), (1, "/"), (2, "/group"), (2, "/")]
    reading = HostSampler(*roots).read()
    assert (reading.available_bytes, reading.limit_source) == (44 * MIB, "cgroup v1 /process_api/93")
    assert reading.pressure_some_avg10 == 7.5


def test_limits_in_both_hierarchies_bind_together(tree: Tree) -> None:
    cgroup = {**v1("/a", 2 * SMALL, 0), **{f"unified/{name}": text for name, text in v2("b", str(SMALL), 0).items()}}
    reading = HostSampler(*tree("4:memory:/a\n0::/b\n", HYBRID_MOUNTS, cgroup)).read()
    assert (reading.total_bytes, reading.limit_source) == (SMALL, "cgroup v2 /b")


# what is missing, unreadable or odd


def test_without_any_file_the_host_alone_counts(tree: Tree) -> None:
    reading = HostSampler(*tree(None, None, {})).read()
    assert reading.limit_source == "host"
    assert reading.total_bytes == psutil.virtual_memory().total
    assert reading.pressure_some_avg10 is None


@pytest.mark.parametrize("place", ["", "garbage", "0:\n", "::\n", "4:memory\n", "12:pids:/x\n"])
def test_odd_places_bind_nothing(tree: Tree, place: str) -> None:
    assert bounds(tree(place, HYBRID_MOUNTS, {})) == []


@pytest.mark.parametrize("mounts", ["", "garbage\n", "1 2 3 - cgroup2\n", "30 23 0:26 / - cgroup2 cgroup2 rw\n"])
def test_odd_mountinfo_falls_back_to_the_usual_places(tree: Tree, mounts: str) -> None:
    cgroup = {"cgroup.controllers": "memory\n", **v2("a", str(SMALL), 0)}
    assert [bound.source for bound in bounds(tree("0::/a\n", mounts, cgroup))] == ["cgroup v2 /a"]


def test_usual_places_of_v1_and_hybrid_are_found_without_mountinfo(tree: Tree) -> None:
    # In a container of v1 the path that /proc names is not there: what is mounted is already our cgroup.
    cgroup = {**v1("", SMALL, 20 * MIB), "unified/cgroup.controllers": ""}
    roots = tree("4:memory:/docker/abc\n0::/\n", None, cgroup)
    assert bounds(roots) == [MemoryBound(SMALL, 44 * MIB, "cgroup v1 /")]
    assert CgroupLevel(2, f"{roots[1]}/unified", "/") in cgroup_levels(*roots)


def test_missing_usage_and_stat_leave_the_whole_limit(tree: Tree) -> None:
    roots = tree("0::/a\n", V2_MOUNT, {"a/memory.max": f"{SMALL}\n"})
    assert bounds(roots) == [MemoryBound(SMALL, SMALL, "cgroup v2 /a")]


def test_unreadable_files_bind_nothing(tree: Tree, tmp_path: Path) -> None:
    roots = tree("0::/a\n", V2_MOUNT, v2("a", str(SMALL), 0))
    limit = tmp_path / "cgroup/a/memory.max"
    limit.unlink()
    limit.mkdir()  # opens, and fails to be read: for root as well, whom no permission stops
    (tmp_path / "proc/pressure/memory").mkdir(parents=True)
    assert bounds(roots) == []
    assert HostSampler(*roots).read().pressure_some_avg10 is None


@pytest.mark.parametrize("text", ["", "max\n", "-1\n", "12 34\n", "many\n", "\u0661\n"])
def test_what_is_no_number_is_no_limit(tree: Tree, text: str) -> None:
    assert bounds(tree("0::/a\n", V2_MOUNT, {"a/memory.max": text})) == []


@pytest.mark.parametrize("place", ["0::/../other\n", "0::/elsewhere\n"])
def test_a_place_outside_the_mount_is_read_at_the_mount(tree: Tree, place: str) -> None:
    mount = V2_MOUNT.replace(" / /sys", " /docker/abc /sys")
    assert bounds(tree(place, mount, v2("", str(SMALL), 0))) == [MemoryBound(SMALL, SMALL, "cgroup v2 /docker/abc")]


def test_a_name_that_merely_begins_like_the_mounted_part_lies_outside(tree: Tree) -> None:
    mount = V2_MOUNT.replace(" / /sys", " /docker/abc /sys")
    assert names(tree("0::/docker/abcdef\n", mount, {})) == [(2, "/docker/abc")]


def test_of_several_mounts_the_one_that_shows_most_is_read(tree: Tree) -> None:
    part = "44 23 0:26 /pod /sys/fs/cgroup/part rw - cgroup2 cgroup2 rw\n"
    other = "45 23 0:26 /other /sys/fs/cgroup/other rw - cgroup2 cgroup2 rw\n"
    roots = tree("0::/pod/a\n", other + part + V2_MOUNT, {})
    assert [level.folder for level in cgroup_levels(*roots)] == [f"{roots[1]}{tail}" for tail in ("/pod/a", "/pod", "")]


def test_blanks_in_mount_points_are_decoded(tree: Tree, tmp_path: Path) -> None:
    mounts = V2_MOUNT.replace("/sys/fs/cgroup", str(tmp_path / "my mount").replace(" ", "\\040"))
    roots = tree("0::/a\n", mounts, {})
    assert cgroup_levels(*roots)[0] == CgroupLevel(2, str(tmp_path / "my mount" / "a"), "/a")


def test_a_process_that_is_moved_is_found_again(tree: Tree, tmp_path: Path) -> None:
    cgroup = {**v2("a", str(SMALL), 0), **v2("b", str(SMALL // 2), 0)}
    sampler = HostSampler(*tree("0::/a\n", V2_MOUNT, cgroup))
    assert sampler.read().limit_source == "cgroup v2 /a"
    (tmp_path / "proc/self/cgroup").write_text("0::/b\n")
    assert sampler.read().limit_source == "cgroup v2 /b"


def test_a_limit_that_is_changed_counts_at_the_next_reading(tree: Tree, tmp_path: Path) -> None:
    sampler = HostSampler(*tree("0::/a\n", V2_MOUNT, v2("a", str(SMALL), 0)))
    assert sampler.read().total_bytes == SMALL
    (tmp_path / "cgroup/a/memory.max").write_text(f"{SMALL // 2}\n")
    assert sampler.read().total_bytes == SMALL // 2


# pressure and CPU


PSI = "some avg10={} avg60=9.99 avg300=9.99 total=123\nfull avg10=99.00 avg60=0.00 avg300=0.00 total=0\n"


@pytest.mark.parametrize(("host", "own", "expected"), [
    ("0.00", None, 0.0), ("12.34", None, 12.34), ("1.00", "55.10", 55.1), ("60.00", "2.00", 60.0), (None, "3.00", 3.0),
    (None, None, None),
])
def test_pressure_is_the_worse_of_host_and_cgroup(tree: Tree, host: str | None, own: str | None,
                                                  expected: float | None) -> None:
    cgroup = {"a/memory.pressure": PSI.format(own)} if own else {}
    proc = {"pressure/memory": PSI.format(host)} if host else {}
    assert HostSampler(*tree("0::/a\n", V2_MOUNT, cgroup, proc)).read().pressure_some_avg10 == expected


def test_pressure_further_up_is_not_ours_where_our_own_is_known(tree: Tree) -> None:
    cgroup = {"a/memory.pressure": PSI.format("80.00"), "a/b/memory.pressure": PSI.format("1.00")}
    assert HostSampler(*tree("0::/a/b\n", V2_MOUNT, cgroup)).read().pressure_some_avg10 == 1.0


def test_busy_percent_counts_idle_and_iowait_as_idle_and_guests_once() -> None:
    before = psutil.cpu_times()._replace(**dict.fromkeys(psutil.cpu_times()._fields, 0.0))
    after = before._replace(user=20.0, system=5.0, steal=5.0, idle=60.0, iowait=10.0, guest=15.0)
    assert busy_percent(before, after) == pytest.approx(30.0)


def test_busy_percent_of_no_time_or_of_counters_that_step_back() -> None:
    before = psutil.cpu_times()
    assert busy_percent(before, before) == 0.0
    back = before._replace(iowait=before.iowait - 50.0, user=before.user + 1.0, idle=before.idle + 1.0)
    assert busy_percent(before, back) == pytest.approx(50.0)
