du -k "${1:-.}" | sort -rn | head -n "${2:-10}"
