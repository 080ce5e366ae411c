# A virtual environment with this project in it, sourced by the other scripts.
#
#   . launch/env.sh
#   make_env train,dev      # extras of setup.cfg; sets VENV_PYTHON
#
# PYTHON chooses the interpreter (3.11 or newer). The environment is .venv; a
# PYTHON with another version than the one in .venv gets .venv-<version> beside
# it. uv is used if it is already installed, pip otherwise.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

make_env() {
  local extras=$1 python=${PYTHON:-python3} version venv stamp wanted
  version=$(_version "$python") || {
    echo "PYTHON=$python does not run; set PYTHON to Python 3.11 or newer" >&2
    return 1
  }
  if [ "${version%%.*}" -lt 3 ] || { [ "${version%%.*}" -eq 3 ] && [ "${version#*.}" -lt 11 ]; }; then
    echo "$python is Python $version; set PYTHON to Python 3.11 or newer" >&2
    return 1
  fi

  venv=$root/.venv
  if [ -x "$venv/bin/python" ] && [ "$(_version "$venv/bin/python")" != "$version" ]; then
    # A broken environment (without its interpreter) is made again.
    if [ -n "$(_version "$venv/bin/python")" ]; then venv=$root/.venv-$version; fi
  fi
  VENV_PYTHON=$venv/bin/python

  # The source of the environment; if it is unchanged, nothing is installed.
  stamp=$venv/.made_from
  wanted="$(cat "$root/setup.cfg" "$root/launch/tested_versions.txt" | cksum) $root"
  if [ "$(_version "$VENV_PYTHON")" = "$version" ] && [ -f "$stamp" ] \
      && grep -qxF "$wanted [$extras]" "$stamp"; then
    return 0
  fi

  echo "Installing mtl_jax[$extras] into $venv with Python $version ..." >&2
  local uv=
  if command -v uv >/dev/null 2>&1; then uv=1; fi
  if [ "$(_version "$VENV_PYTHON")" != "$version" ]; then
    if [ -n "$uv" ]; then
      uv venv --quiet --clear --python "$python" "$venv" || return 1
    else
      "$python" -m venv --clear "$venv" || return 1
    fi
  fi
  if [ -n "$uv" ]; then
    uv pip install --quiet --python "$VENV_PYTHON" \
      -c "$root/launch/tested_versions.txt" -e "$root[$extras]" || return 1
  else
    "$VENV_PYTHON" -m pip install --quiet --disable-pip-version-check \
      -c "$root/launch/tested_versions.txt" -e "$root[$extras]" || return 1
  fi
  # Extras add up: an environment for tests also serves for training.
  if [ -f "$stamp" ] && ! grep -qF "$wanted " "$stamp"; then rm "$stamp"; fi
  echo "$wanted [$extras]" >>"$stamp"
  case ,$extras, in *,dev,*) echo "$wanted [train]" >>"$stamp" ;; esac
}
