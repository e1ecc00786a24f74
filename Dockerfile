# The same environment and the same make targets, in an image. Build: docker build -t loupe .
# Run: docker run -it --name loupe -v /path/to/images:/photos:ro loupe make run DATA=/photos
# Models, reports and the record stay in that container: docker cp loupe:/home/loupe/project/reports .
FROM python:3.12-slim-bookworm AS environment
RUN apt-get update && apt-get install --yes --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home loupe && install --directory --owner loupe /home/loupe/project
USER loupe
WORKDIR /home/loupe/project
COPY --chown=loupe requirements.txt pyproject.toml README.md Makefile ./
COPY --chown=loupe src src
RUN make environment

FROM python:3.12-slim-bookworm
RUN apt-get update && apt-get install --yes --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home loupe && install --directory --owner loupe /home/loupe/project
USER loupe
WORKDIR /home/loupe/project
COPY --from=environment --chown=loupe /home/loupe/project/.venv .venv
COPY --from=environment --chown=loupe /home/loupe/project/.prefect .prefect
COPY --chown=loupe . .
RUN touch .venv/.installed
CMD ["make", "run"]
