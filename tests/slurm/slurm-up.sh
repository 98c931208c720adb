#!/usr/bin/env bash
# The cluster of `make test-slurm`: a real Slurm on this machine alone, for as long as the tests run.
#
#   slurm-up.sh up     DIR   install what is missing, start, wait until all nodes are idle;
#                            prints `export ...` lines on stdout:  eval "$(slurm-up.sh up DIR)"
#   slurm-up.sh env    DIR   print the same lines again
#   slurm-up.sh status DIR   daemons and nodes; exit status 0 only if all of it is up
#   slurm-up.sh down   DIR   cancel the jobs, stop every daemon by pid; logs stay in DIR/log
#
# Everything lives in DIR: configuration, munge key and socket, database, spool, logs. Nothing is
# written to /etc and no system service is used, so several clusters can run side by side, and
# `down` undoes all of `up` but the installed packages. `up` on a running cluster is a no-op.
#
# It starts munged, slurmctld and one slurmd per node; also mariadbd and slurmdbd, because submitit
# asks `sacct` for job states. All run as the calling user. As root, any user can submit jobs;
# otherwise only the calling user can (root or passwordless sudo is then needed to install only).
#
# Nodes are named 127.0.0.1, 127.0.0.2, ... : the name of a node is what submitit and torchrun use
# as MASTER_ADDR, and these resolve without an entry in /etc/hosts.
#
# Partitions: `main` (default; its jobs can be preempted and requeued) and `high` (preempts `main`).
#
# Settings (environment, read by `up`):
#   SLURM_UP_NODES=2         number of nodes
#   SLURM_UP_CPUS=8          CPUs per node, as far as Slurm knows (not checked against the machine)
#   SLURM_UP_GPUS=8          GPUs per node, as far as Slurm knows: it counts them and sets
#                            CUDA_VISIBLE_DEVICES, no more
#   SLURM_UP_ACCOUNTING=1    0: no database; then `sacct` fails and submitit states are UNKNOWN
#   SLURM_UP_GRACE=20        seconds between the preemption signal and the kill
#   SLURM_UP_REQUEUE_WAIT=10 seconds a requeued job waits before it starts again
#   SLURM_UP_INSTALL=1       0: never install, fail if something is missing

set -euo pipefail

NODES=${SLURM_UP_NODES:-2}
CPUS=${SLURM_UP_CPUS:-8}
GPUS=${SLURM_UP_GPUS:-8}
ACCOUNTING=${SLURM_UP_ACCOUNTING:-1}
GRACE=${SLURM_UP_GRACE:-20}
REQUEUE_WAIT=${SLURM_UP_REQUEUE_WAIT:-10}
INSTALL=${SLURM_UP_INSTALL:-1}

PATH=$PATH:/usr/sbin:/sbin     # daemons live there; a plain user's PATH may lack it

say() { echo "slurm-up: $*" >&2; }
die() { say "$*"; exit 1; }

# ---------------------------------------------------------------- processes, by identity

# Start time of a process in clock ticks since boot; fails if it is gone or a zombie (where pid 1
# does not reap, a dead daemon stays a zombie, and `kill -0` would still succeed).
start_time() {
    local stat fields
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    read -ra fields <<<"${stat##*) }"        # fields after the command name: state is field 0
    [ "${fields[0]}" != Z ] && [ "${fields[0]}" != X ] && echo "${fields[19]}"
}

# A pid alone may have been reused; pid and start time together name one process.
alive() {
    local pid start
    { read -r pid start <"$DIR/run/$1.id"; } 2>/dev/null || return 1
    [ "$(start_time "$pid")" = "$start" ]
}

# start NAME COMMAND... : run a daemon in the foreground of its own session, and note who it is.
# No inherited descriptor may stay open: `$(slurm-up.sh up)` would wait for it, and so would flock.
start() {
    local name=$1 pid begun
    shift
    setsid env -i PATH="$PATH" HOME="${HOME:-/}" LANG=C.UTF-8 ${TZ:+"TZ=$TZ"} SLURM_CONF="$CONF" \
        MYSQL_UNIX_PORT="$DIR/db/mysql.sock" "$@" \
        </dev/null >"$DIR/log/$name.out" 2>&1 9>&- &
    pid=$!
    begun=$(start_time "$pid") || die "$name died at once: see $DIR/log"
    echo "$pid $begun" >"$DIR/run/$name.id"
}

# stop NAME : SIGTERM, and SIGKILL if it has not gone after 10 s.
stop() {
    local name=$1 signal pid _
    [ -e "$DIR/run/$name.id" ] || return 0
    for signal in TERM KILL; do
        alive "$name" || break
        read -r pid _ <"$DIR/run/$name.id"
        kill -s "$signal" "$pid" 2>/dev/null || true
        for _ in $(seq 100); do alive "$name" || break; sleep 0.1; done
    done
    alive "$name" && { say "could not stop $name (pid $pid)"; return 1; }
    rm -f "$DIR/run/$name.id"
}

# wait_for SECONDS WHAT COMMAND... : until the command succeeds; fails if a daemon dies meanwhile.
wait_for() {
    local limit=$1 what=$2 end id name
    shift 2
    end=$((SECONDS + limit))
    until "$@" >/dev/null 2>&1; do
        for id in "$DIR"/run/*.id; do
            name=$(basename "$id" .id)
            alive "$name" && continue
            tail -n 20 "$DIR/log/$name.out" >&2
            die "$name died; see $DIR/log"
        done
        [ "$SECONDS" -lt "$end" ] || die "$what: not ready after $limit s; see $DIR/log"
        sleep 0.1
    done
}

# ---------------------------------------------------------------- installation

install_packages() {
    local need=(slurmctld slurmd sbatch munged) packages=(slurmctld slurmd slurm-client munge)
    local command missing=0 sudo=() policy=/usr/sbin/policy-rc.d guard=0 rc=0
    if [ "$ACCOUNTING" = 1 ]; then
        need+=(slurmdbd mariadbd) packages+=(slurmdbd mariadb-server-core)
    fi
    for command in "${need[@]}"; do command -v "$command" >/dev/null || missing=1; done
    [ "$missing" = 1 ] || return 0
    [ "$INSTALL" = 1 ] || die "not installed: one of ${need[*]}"
    [ "$(id -u)" = 0 ] || sudo=(sudo -n)
    say "installing ${packages[*]}"
    # The packages would start system services; this file is Debian's way to say no.
    if [ ! -e "$policy" ]; then
        guard=1
        printf '#!/bin/sh\nexit 101\n' | "${sudo[@]}" tee "$policy" >/dev/null
        "${sudo[@]}" chmod 755 "$policy"
    fi
    {
        "${sudo[@]}" apt-get update -q -o DPkg::Lock::Timeout=300 &&
            "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive \
                apt-get install -qy --no-install-recommends -o DPkg::Lock::Timeout=300 "${packages[@]}"
    } >"$DIR/log/apt.log" 2>&1 || rc=$?
    [ "$guard" = 0 ] || "${sudo[@]}" rm -f "$policy"
    [ "$rc" = 0 ] || { tail -n 20 "$DIR/log/apt.log" >&2; die "apt-get failed: $rc"; }
}

# ---------------------------------------------------------------- configuration

port_in_use() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# A run of free ports below the ephemeral range: base (slurmctld), +1 (slurmdbd), +2.. (slurmd).
free_ports() {
    local base port
    for base in $(seq 16800 50 19900); do
        for port in $(seq "$base" $((base + 1 + NODES))); do
            port_in_use "$port" && continue 2
        done
        echo "$base"
        return
    done
    die "no free ports"
}

version_at_least() { printf '%s\n' "$1" "$(slurmd -V | grep -o '[0-9.]*$')" | sort -CV; }

write_config() {
    local base user host n
    base=$(free_ports)
    user=$(id -un)
    host=$(uname -n)
    host=${host%%.*}
    head -c 128 /dev/urandom >"$DIR/munge/key"
    chmod 600 "$DIR/munge/key"

    cat >"$CONF" <<EOF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$base
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it may start again (default 120 s). Keep
# it well above KillWait: a job that comes back to a node where its old processes still live fails
# to launch ("Duplicate jobid"), the node is drained and the job held.
AuthInfo=socket=$DIR/run/munge.sock,cred_expire=$REQUEUE_WAIT
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd-%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd-%n.log

# No cgroups, no root needed: follow processes by parentage.
ProctrackType=proctrack/linuxproc
PropagateResourceLimits=NONE

# Believe the sizes below, whatever the machine has.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2

# Be quick: seconds between SIGTERM and SIGKILL (default 30), and between scheduling rounds.
KillWait=5
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1

# A job in 'high' takes the place of jobs in 'main': they get their --signal at once (submitit:
# USR2), then GraceTime seconds, then they are killed and requeued.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal

# Job ids that differ from run to run: submitit would take an old result in a reused folder for new.
FirstJobId=$(($(date +%s) % 60000000 + 1))
EOF
    [ "$ACCOUNTING" = 1 ] && cat >>"$CONF" <<EOF
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((base + 1))
AccountingStoragePass=$DIR/run/munge.sock
EOF
    {
        echo
        for n in $(seq "$NODES"); do
            echo "NodeName=127.0.0.$n NodeHostname=$host NodeAddr=127.0.0.$n" \
                "Port=$((base + 1 + n)) CPUs=$CPUS RealMemory=1000000 Gres=gpu:$GPUS"
        done
        echo "PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=$GRACE"
        echo "PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF"
    } >>"$CONF"
    # slurmd loads a cgroup plugin even if nothing uses it. Newer ones can do without; v1 of the older
    # ones asks nothing of the machine as long as it is not used.
    if version_at_least 23.11; then
        echo CgroupPlugin=disabled
    else
        echo CgroupPlugin=cgroup/v1
    fi >"$DIR/etc/cgroup.conf"

    # Slurm wants a character device per GPU, each with a name of its own.
    for n in $(seq 0 $((GPUS - 1))); do ln -s /dev/null "$DIR/spool/gpu$n"; done
    [ "$GPUS" = 0 ] || echo "Name=gpu File=$DIR/spool/gpu[0-$((GPUS - 1))]" >"$DIR/etc/gres.conf"

    cat >"$DIR/etc/slurmdbd.conf" <<EOF
AuthType=auth/munge
AuthInfo=socket=$DIR/run/munge.sock
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=$((base + 1))
SlurmUser=$user
LogFile=$DIR/log/slurmdbd.log
PidFile=$DIR/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=$user
StorageLoc=slurm_acct_db
EOF
    chmod 600 "$DIR/etc/slurmdbd.conf"

    # No network, no accounts, no system tables: whoever can reach the socket can use it, and DIR/db
    # is closed to others.
    cat >"$DIR/etc/my.cnf" <<EOF
[mariadbd]
user=$user
datadir=$DIR/db
socket=$DIR/db/mysql.sock
pid-file=$DIR/run/mariadbd.pid
log-error=$DIR/log/mariadbd.log
skip-networking
skip-grant-tables
innodb-buffer-pool-size=32M
innodb-log-file-size=8M
innodb-flush-log-at-trx-commit=0
innodb-lock-wait-timeout=900
EOF
}

# ---------------------------------------------------------------- commands

daemons() {
    local n
    echo munged
    [ ! -e "$DIR/etc/my.cnf" ] || ! grep -q '^AccountingStorageType' "$CONF" || echo mariadbd slurmdbd
    echo slurmctld
    for n in $(grep -o '^NodeName=[^ ]*' "$CONF" | cut -d= -f2); do echo "slurmd-$n"; done
}

nodes_idle() {
    local states
    states=$(sinfo -h -N -p main -o %t) && [ -n "$states" ] && ! grep -qvx idle <<<"$states"
}

all_alive() {
    local name
    [ -e "$CONF" ] || return 1
    for name in $(daemons); do alive "$name" || return 1; done
}

print_env() {
    [ -e "$CONF" ] || die "nothing in $DIR"
    printf 'export SLURM_CONF=%q\n' "$CONF"
    echo 'export GLOO_SOCKET_IFNAME=lo'      # all nodes are this machine, whatever its name is
}

up() {
    local name n begin=$SECONDS
    if all_alive; then say "already up"; print_env; return; fi
    if [ -e "$DIR/.slurm-up" ]; then
        down                                  # what an earlier run may have left
    elif [ -n "$(ls -A "$DIR")" ]; then
        die "$DIR is not empty and not ours"
    fi
    touch "$DIR/.slurm-up"
    trap 'say "failed; stopping what was started"; down' EXIT
    rm -rf "${DIR:?}"/{etc,run,state,spool,db,munge,log}
    mkdir "$DIR"/{etc,run,state,spool,db,munge,log}
    chmod 700 "$DIR"/{db,munge}
    install_packages
    write_config
    for n in $(seq "$NODES"); do mkdir "$DIR/spool/127.0.0.$n"; done

    # --force: accept a DIR below a group-writable folder, as CI work folders are.
    start munged munged --foreground --force --socket="$DIR/run/munge.sock" \
        --key-file="$DIR/munge/key" --seed-file="$DIR/munge/seed" \
        --pid-file="$DIR/run/munged.pid" --log-file="$DIR/log/munged.log" --num-threads=4
    [ "$ACCOUNTING" = 1 ] && start mariadbd mariadbd --defaults-file="$DIR/etc/my.cnf"
    wait_for 20 munged munge -n -S "$DIR/run/munge.sock"
    if [ "$ACCOUNTING" = 1 ]; then
        wait_for 60 mariadbd test -S "$DIR/db/mysql.sock"
        start slurmdbd slurmdbd -D
        wait_for 60 slurmdbd sacctmgr -in show cluster
        sacctmgr -iQ add cluster test >/dev/null
    fi
    start slurmctld slurmctld -D -c -f "$CONF"
    wait_for 60 slurmctld scontrol ping
    for n in $(seq "$NODES"); do start "slurmd-127.0.0.$n" slurmd -D -f "$CONF" -N "127.0.0.$n"; done
    wait_for 60 nodes nodes_idle
    all_alive || die "a daemon died: see $DIR/log"
    trap - EXIT
    say "$(sinfo -h -p main -o '%D nodes %T') after $((SECONDS - begin)) s"
    print_env
}

# Pids of this cluster's jobs: the processes with our SLURM_CONF that have a job id, or are slurmstepd.
# (A shell that exported SLURM_CONF has neither.)
job_processes() {
    local pid
    for pid in $(grep -lszxF "SLURM_CONF=$CONF" /proc/[0-9]*/environ | cut -d/ -f3); do
        if grep -qsz '^SLURM_JOB_ID=' "/proc/$pid/environ" ||
            [[ $(readlink "/proc/$pid/exe") == */slurmstepd* ]]; then
            echo "$pid"
        fi
    done
}

# Job processes outlive the daemons, so they go first: scancel, and SIGKILL for those that ignore
# its SIGTERM (submitit's do).
stop_jobs() {
    local ids pids _
    if alive slurmctld; then
        ids=$(squeue -h -o %A | sort -u || true)
        [ -z "$ids" ] || xargs scancel <<<"$ids" 2>/dev/null || true
        for _ in $(seq 10); do [ -n "$(job_processes)" ] || return 0; sleep 0.2; done
    fi
    for _ in $(seq 50); do
        pids=$(job_processes)
        [ -n "$pids" ] || return 0
        xargs kill -KILL <<<"$pids" 2>/dev/null || true
        sleep 0.1
    done
    say "could not stop the job processes $(xargs <<<"$pids")"
}

down() {
    local name
    if [ -e "$CONF" ]; then
        stop_jobs
        for name in $(daemons | tr ' ' '\n' | tac); do stop "$name"; done
        stop_jobs                             # one may have started in between
        rm -rf "${DIR:?}"/{run,state,spool,db,munge}
    fi
}

status() {
    local name rc=0
    [ -e "$CONF" ] || die "nothing in $DIR"
    for name in $(daemons); do
        if alive "$name"; then
            echo "$name: pid $(cut -d' ' -f1 "$DIR/run/$name.id")"
        else
            echo "$name: not running"
            rc=1
        fi
    done
    [ "$rc" = 0 ] && sinfo
    return "$rc"
}

case $#:${1:-} in
    2:up | 2:down | 2:env | 2:status) ;;
    *) sed -n '2,/^$/{s/^# \{0,1\}//;p}' "$0" >&2; exit 2 ;;
esac
case $1 in
    up) mkdir -p "$2" ;;
    down) [ -d "$2" ] || exit 0 ;;
esac
DIR=$(cd "$2" && pwd -P)
[ "${#DIR}" -le 80 ] || die "$DIR is too long a path for Unix sockets (80 characters at most)"
CONF=$DIR/etc/slurm.conf
export SLURM_CONF=$CONF

case $1 in
    up | down)
        exec 9<"$DIR"                         # one at a time
        flock 9
        "$1"
        say "$1: done"
        ;;
    env) print_env ;;
    status) status ;;
esac
