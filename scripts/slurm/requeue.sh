# Sourced by the batch scripts of this folder: start one process a task, pass signals on, requeue what has saved itself.

# train_and_requeue OVERRIDE... : train.py over all tasks of the job; exits with its code.
train_and_requeue() {
  local status=0 asked=0 step job
  local first=127.0.0.1 # where the processes meet: tasks of several nodes at the first one; a site may set another
  ((SLURM_JOB_NUM_NODES == 1)) || first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  export MASTER_ADDR=${MASTER_ADDR:-$first}
  srun --kill-on-bad-exit=1 "${PYTHON:-.venv/bin/python}" train.py trainer=ddp "$@" &
  step=$!
  # SLURM signals this shell before the time limit (--signal=B:USR1@...); the run saves at the next step and leaves.
  trap 'asked=1; echo "SIGUSR1: passed on to the run"; kill -USR1 "$step"' USR1
  while :; do # a trap ends wait early
    status=0
    wait "$step" || status=$?
    kill -0 "$step" 2>/dev/null || break
  done
  # of an array, whose last element bears the array's own number, this element alone
  job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
  job=${job:-$SLURM_JOB_ID}
  # 138 from the task that saved, or 143 from one that srun ended beside it. A failure of the run itself is below 128.
  # Preemption with a grace time signals the tasks and not this shell; a run that leaves early would end the job for good.
  if ((status >= 128)) && { ((asked)) || scontrol show job "$job" | grep -q 'PreemptTime=[0-9]'; }; then
    echo "The run has saved itself; requeueing job $job"
    scontrol requeue "$job"
    sleep 60 # SLURM ends this shell
  fi
  exit "$status"
}
