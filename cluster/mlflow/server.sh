#!/usr/bin/env bash
# Starts an MLflow server for a team, with passwords. Needs the extra `server`: pip install "pal-pipeline[server]".
#   MLFLOW_AUTH_ADMIN_PASSWORD=... MLFLOW_FLASK_SERVER_SECRET_KEY=... cluster/mlflow/server.sh FOLDER
# STORE=postgresql://host/mlflow (password in ~/.pgpass) replaces sqlite; ARTIFACTS=s3://bucket/mlflow replaces FOLDER.
# It listens on HOST, by default 127.0.0.1. Passwords are sent in clear text: put it behind a proxy with TLS before others
# use it.
set -euo pipefail
folder=$(realpath -m "${1:?give the folder of the server}")
mkdir -p "$folder"
chmod 700 "$folder"
cat >"$folder/auth.ini" <<END
[mlflow]
default_permission = READ
database_uri = sqlite:///$folder/auth.db
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
END
export MLFLOW_AUTH_CONFIG_PATH=$folder/auth.ini
: "${MLFLOW_FLASK_SERVER_SECRET_KEY:?set a long random text, the same at every start}"
exec mlflow server --app-name basic-auth --host "${HOST:-127.0.0.1}" --port "${PORT:-5000}" --workers "${WORKERS:-4}" \
  --backend-store-uri "${STORE:-sqlite:///$folder/mlflow.db}" --artifacts-destination "${ARTIFACTS:-$folder/artifacts}"
