#!/usr/bin/env bash
# Starts a real SLURM on this machine, for itself alone, and runs slurm_acceptance.py on it. Needs root and apt-get, or
# SLURM and munge installed; says why and ends with 0 where it has neither. Two to three minutes on two idle cores.
#   PYTHON=.venv/bin/python tests/cluster/slurm.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}

skip() { echo "skipped: $1"; exit 0; }
[ "$(uname)" = Linux ] || skip "SLURM needs Linux"
[ "$(id -u)" = 0 ] || skip "starting a SLURM needs root"
if ! command -v slurmctld slurmd munged sbatch srun >/dev/null; then
  command -v apt-get >/dev/null || skip "SLURM is not installed, and there is no apt-get"
  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends slurm-wlm munge; } \
    >/dev/null 2>&1 || skip "apt-get could not install slurm-wlm and munge"
fi

place=$(mktemp -d)
name=$(hostname -s)
export SLURM_CONF=$place/slurm.conf
stop() {
  scancel --full --signal=KILL --user=root 2>/dev/null || true
  local daemon pid
  for daemon in slurmd slurmctld munged; do
    pid=$(cat "$place/$daemon.pid" 2>/dev/null) || continue
    kill "$pid" 2>/dev/null || continue
    for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null && sleep 0.2 || break; done
    kill -KILL "$pid" 2>/dev/null || true
  done
  [ "$1" = 0 ] || tail -n 15 "$place"/*.log 2>/dev/null || true
  rm -rf "$place"
}
trap 'code=$?; stop $code; exit $code' EXIT

mkdir "$place/state" "$place/spool"
(umask 077 && head -c 1024 /dev/urandom >"$place/munge.key")
# cred_expire is also how long a requeued job waits.
cat >"$SLURM_CONF" <<EOF
ClusterName=acceptance
SlurmctldHost=$name(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket=$place/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SlurmctldPort=16817
SlurmdPort=16818
SlurmctldPidFile=$place/slurmctld.pid
SlurmdPidFile=$place/slurmd.pid
SlurmdSpoolDir=$place/spool
StateSaveLocation=$place/state
SlurmctldLogFile=$place/slurmctld.log
SlurmdLogFile=$place/slurmd.log
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
NodeName=$name NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
EOF
munged --force --key-file="$place/munge.key" --socket="$place/munge.socket" --pid-file="$place/munged.pid" \
  --log-file="$place/munged.log" --seed-file="$place/munged.seed"
slurmctld -f "$SLURM_CONF"
slurmd -f "$SLURM_CONF"
for _ in $(seq 50); do
  sinfo --noheader --format=%T 2>/dev/null | grep -q idle && break
  sleep 0.2
done
sinfo --noheader --format=%T | grep -q idle || { echo "SLURM did not start"; exit 1; }
"$PYTHON" tests/cluster/slurm_acceptance.py "$place"
