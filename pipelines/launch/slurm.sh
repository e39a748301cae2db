#!/bin/bash
# Either stage as a SLURM job that resumes after preemption, time limit and lost nodes (docs/guides/several-machines.md).
#
#   sbatch --nodes 4 --ntasks-per-node 8 --gpus-per-node 8 --cpus-per-task 12 --time 24:00:00 \
#     pipelines/launch/slurm.sh distill --student.name resnet50 --cache /shared/caches/imagenet --run /shared/runs/r50
#
# Arguments after the script are those of `python -m pipelines.<command>`. PYTHON= sets the interpreter, MAX_RESTARTS=
# the number of times the job may be requeued. srun starts the processes: torchrun would turn their exit code into 1.
#SBATCH --job-name=scalekd
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
set -uo pipefail
[ $# -gt 0 ] && set -- "${1//-/_}" "${@:2}"  # cache-teacher is the module cache_teacher

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
[ "${SLURM_JOB_NUM_NODES:-0}" = 1 ] && MASTER_ADDR=127.0.0.1  # does not depend on how the host name resolves
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export PYTHON=${PYTHON:-python} OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}} PYTHONUNBUFFERED=1

# Stage 1 continues without a lost process; stage 2 cannot.
kill=1
[ "${1:-}" = cache_teacher ] && kill=0

# Loader workers: one per core of a task, none with few cores, as `make` does.
cores=${SLURM_CPUS_PER_TASK:-1} workers=()
case ${1:-} in
  cache_teacher | distill) [[ "$cores" -gt 4 && ! " $*" =~ \ --(train\.)?workers[\ =] ]] && workers=(--workers "$cores") ;;
esac

# Five minutes before the time limit the processes get USR1: stage 2 saves and exits with 75, stage 1 exits (138).
# From SLURM 22.05 on, srun takes the cores of a task from its own option only.
srun --kill-on-bad-exit=$kill ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  tasks=${SLURM_STEP_TASKS_PER_NODE:-1} && export LOCAL_WORLD_SIZE=${tasks%%[^0-9]*}  # "8(x4)"
  exec "$PYTHON" -m "pipelines.$@"' run "$@" "${workers[@]}"
status=$?

# 134: NCCL ended the process. A rank was lost, so the job resumes from the last checkpoint.
case $status in
  75 | 134 | 138 | 143)
    if [ "${SLURM_RESTART_COUNT:-0}" -lt "${MAX_RESTARTS:-100}" ]; then
      echo "exit code $status: requeued (restart $((${SLURM_RESTART_COUNT:-0} + 1)))"
      scontrol requeue "$SLURM_JOB_ID"
    fi
    ;;
esac
exit $status
