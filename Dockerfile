# The endpoint: docker build -t tiny-audio . && docker run -p 8000:8000 -v $PWD/outputs:/models tiny-audio
FROM python:3.12-slim
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir '.[serve]' -c constraints.txt
EXPOSE 8000
ENTRYPOINT ["tiny-audio", "serve", "--host", "0.0.0.0"]
CMD ["/models/quickstart"]
