# GPU image of the project: docker build -t onlinenorm . && docker run --gpus all onlinenorm
# The CUDA libraries come with torch's wheels; the base image adds the container settings that expose the driver.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

RUN apt-get update \
 && apt-get install -y --no-install-recommends git python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /onlinenorm
COPY . .
RUN scripts/environment.sh

CMD ["scripts/quickstart.sh"]
