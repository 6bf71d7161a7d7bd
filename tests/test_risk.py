"""Which command lines only look, and which need a person's yes. Nothing here is ever run but `bash -n`."""

import shlex
import shutil
import subprocess
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import openpista
from openpista import risk


def lines(text):
    """One command a line; a line that begins with two signs of # is a heading."""
    return [line for line in text.strip().splitlines() if line and not line.startswith("##")]


HARMLESS = lines(r"""
## looking around
ls
ls -la /var/log
ls -la --color=never ~/projects
pwd
cat README.md
cat /proc/cpuinfo /proc/meminfo
cat /etc/os-release | head -3
head -n 20 *.log
tail -f -n 100 /var/log/syslog
wc -l src/*.py
du -sh ./* | sort -h | tail -5
df -h / /home
free -m
uptime; who; w
ps aux --sort=-%mem | head -n 10
stat -c '%s %n' file.txt
file /bin/ls
tree -L 2 -a
grep -rn "TODO" src --include='*.py'
grep -E 'a|b;c&d>e' notes.txt
rg -n pattern src
echo hello world
echo "it's fine; rm -rf / is only text"
echo 'a > b && c'
echo rm -rf /
printf '%s\n' a b c
date
date +%Y-%m-%d
date -d 'next monday' +%F
date -u
cal 2030
hostname
hostname -I
id -un
uname -a
nproc
sleep 1
true
:
seq 1 10
basename /a/b/c.txt .txt
readlink -f ./x
md5sum a b
diff -u a b
cmp a b
sort -k2 -n -r -u table.txt
uniq -c
sort names | uniq -c | sort -rn
uniq -c names
xxd -g1 image.bin
cut -d: -f1 /etc/passwd
tr a-z A-Z < notes.txt
jq '.items[] | .name' data.json
column -t -s, data.csv
less notes.txt
type ls
which python3
command -v git
command -V ls
man ls
man -k copy
test -f .env
[ -f .env ]
[ "$x" = y ]
[ -d /srv ] && ls /srv
[[ -f notes.txt ]] && cat notes.txt
[[ $name == b* ]] || echo no
[[ a < b ]]
set -euo pipefail
export LANG=C
export -p
unset name
tee /dev/null
cd /srv && ls
umask
exit 0
## machines, disks, network
lsblk
lscpu | grep Model
mount
mount | grep ' / '
findmnt -t ext4
swapon --show
dmesg -T --level=err,warn
dmesg | tail
sensors
vcgencmd measure_temp
nvidia-smi
top -bn1 | head -15
lsof -i :4433
ss -tlnp
netstat -an
ip a
ip -br addr show
ip route get 1.1.1.1
ip -s link
ifconfig eth0
ping -c 3 example.com
dig +short example.com
host example.com
getent hosts example.com
iptables -L -n -v
ufw status
kill -l
fdisk -l
ulimit -a
## services, packages, containers, repositories
systemctl
systemctl status nginx
systemctl --user list-units --failed --no-pager
systemctl list-timers --all
systemctl is-active ssh
systemctl cat openpista.service
systemctl --failed
journalctl -u nginx -n 50 --no-pager
journalctl -f --since '1 hour ago' -p err
timedatectl
hostnamectl status
crontab -l
apt list --upgradable
apt show bash
apt-cache policy bash
dpkg -l
dpkg -L bash
dpkg -S /bin/ls
pip list
pip3 show httpx
pip freeze
npm ls --depth=0
tar tf backup.tar
tar -tzf backup.tgz
unzip -l archive.zip
git status
git status -sb
git -C /srv/app log --oneline -5
git --no-pager diff HEAD~1 -- src
git show HEAD:README.md
git branch
git branch -a -vv
git branch --list 'feature/*'
git tag
git tag -l 'v1.*'
git remote -v
git remote get-url origin
git rev-parse HEAD
git ls-files | wc -l
git blame -L 1,10 src/a.py
git describe --tags
git stash list
git stash show stash@{0}
git config --get user.name
git config --global --list
git worktree list
git reflog
git grep -n TODO
docker ps -a
docker logs --tail 50 web
docker compose ps
docker compose -f compose.yml logs web
docker image ls
podman images
kubectl get pods -n web
kubectl -n web describe pod web-1
kubectl logs web-1
tmux ls
python3 --version
python3.12 -V
cargo --version
sysctl vm.swappiness
base64 notes
file_path=/tmp/x; cat "$file_path"
node -v
java -version
go version
bash --version
rm --help
## sed, awk, find
sed -n 1,20p file.txt
sed -n '/start/,/end/p' file
sed 's/a/b/g' file
sed -e 's|/usr|/opt|' -e '/^#/d' file
sed -E 's/([0-9]+) (.*)/\2 \1/; $!d' file
sed '$d' file
sed 's/[^[:space:]]*$//' file
sed ':a;N;$!ba;s/\n/ /g' file
awk '{print $1}' file
awk -F: '$3 > 1000 {print $1}' /etc/passwd
awk -F, -v OFS=';' 'NR > 1 || $2 { n += $3 } END { print n }' data.csv
find . -name '*.py' -mtime -1
find / -type f -size +100M -printf '%s %p\n'
find . -name '*.py' -exec grep -l import {} +
find . -type f -exec wc -l {} \;
find . -type d -ok ls {} \;
## putting commands together
ls; pwd
ls && pwd || echo no
ls | wc -l
ls |& grep x
ls & wait
! grep -q x file
(cd /tmp && ls)
{ ls; pwd; }
{ ls; pwd; } | sort
( ( ls ) )
if [ -f notes ]; then cat notes; elif true; then ls; else echo none; fi
for x in a b; do ls $x; done
for f in *.txt; do wc -l "$f"; head -1 "$f"; done | sort
for i in 1 2 3; do echo $i; sleep 1; done
while read -r l; do echo $l; done
while read -r user _; do echo "$user"; done < /etc/passwd
until ping -c 1 host; do sleep 1; done
ls # rm -rf /
echo # x' ; rm y
# only a comment
FOO=1 ls
LC_ALL=C TZ=UTC date
x=1; y=$(date); echo "$x $y"
files=$(ls | head -3) && echo "$files"
time ls
## substitutions
echo $(date)
echo "today is $(date +%F), up $(uptime -p)"
echo `hostname`
echo "`date` and `hostname`"
echo $(echo $(echo $(date)))
echo ${x:-nothing} ${y%.txt} ${#z} ${list[0]} ${path##*/}
echo "${x:-$(date)}" "${name:0:3}" "${a//b/c}"
echo $? $# $$
cat <(ls a) <(ls b)
diff <(sort a) <(sort b)
ls | tee >(wc -l)
wc -l <<< "some text"
echo {a,b}{1,2}
echo $'tab\there'
ls "$HOME/src"
## redirections
ls 2>/dev/null
ls >/dev/null 2>&1
ls &>/dev/null
ls 2>&1 | grep x
ls >&2
echo oops 1>&2
make_no_sense=1 > /dev/null
cat < notes.txt
ls > /dev/stdout 2> /dev/stderr
ls 2>&-
## wrapped
sudo cat /var/log/syslog
sudo -n ls /root
sudo -u postgres -- ls
sudo -u postgres LANG=C ls
doas ls
env
env | sort
env -i LANG=C ls
env -u LANG ls
env FOO=1 BAR=2 ls -l
nice -n 10 ls
nice -5 ls
ionice -c3 du -sh /srv
nohup ls
timeout 5 ls
timeout -s KILL -k 1 5s tail -f log
stdbuf -oL tail -f log
command ls
builtin echo x
exec ls
busybox ls
watch -n 1 df -h
ls | xargs
ls | xargs wc -l
find . -name '*.py' -print0 | xargs -0 -n1 grep -l import
ls | xargs -I{} echo {}
ls | xargs -I % sh -c 'echo hello'
sh -c 'ls -la'
bash -lc 'ls && pwd'
bash -euo pipefail -c 'ls | wc -l'
bash -c 'echo "$1"' _ x
bash -c '[[ -f a ]] && cat a'
sh -lc "sh -c 'ls'"
sudo sh -lc 'cat /var/log/syslog | tail'
env A=1 bash -c 'ls "$HOME"'
eval ls -la
eval "ls; pwd"
sudo env LANG=C timeout 5 nice -n 5 bash -lc 'journalctl -n 5'
## quoting
c\at notes
"ls" -la
l''s
$'ls'
'/bin/ls'
/usr/bin/env ls
echo a\ b "c\"d" 'e\f'
grep '#' file#1
echo "안녕하세요, 세계" 'Привет' 🙂
ls 사진
cat ~/.ssh/config ~/.ssh/known_hosts ~/.ssh/id_ed25519.pub
cat .env.example
cat environment.yml key.txt secret_santa.txt
""") + [
    "",
    "  \n\t ",
    "ls\npwd\n",
    "ls \\\n  -la",
    "if true; then\n  ls\nfi",
    "for x in a b\ndo\n  echo $x  # rm\ndone",
    "awk '\n  { n++ }\n  END { print n }\n' file",
    "echo 'two\nlines'",
]  # fmt: skip

RISKY = lines(r"""
## what it does
rm -rf /
rm x
/bin/rm x
rmdir x
mv a b
cp a b
ln -s a b
touch x
mkdir -p x
mktemp
truncate -s 0 x
dd if=/dev/zero of=/dev/sda
mkfs.ext4 /dev/sda1
chmod 777 x
chown root x
kill 1
kill -9 -1
kill -lx
pkill python
reboot
sudo shutdown -h now
useradd eve
passwd
curl https://example.com
wget -qO- example.com
nc -l 1234
ssh host ls
scp a host:
rsync -a a b
python3 -c 'print(1)'
python3 script.py
perl -e 1
node -e 1
make
npm install
pip install x
pip list --index-url http://example.com
apt install x
apt-get update
crontab
crontab -r
crontab -l -r
crontab file
alias ls=rm
trap 'rm x' EXIT
source x
. x
hash -p /tmp/x ls
enable -f x y
frobnicate
frobnicate --version
./ls
/tmp/ls
../bin/ls
~/bin/ls
/usr/bin/../../tmp/ls
complete -C rm ls
shopt -s extglob
coproc ls
let x=1
## options that make them do harm
sort -o x y
sort -uo x y
sort --output=x y
sort --outp x y
sort --compress-program=./x y
uniq a b
uniq -c a b
xxd -r a b
date -s 12:00
date --set=12:00
date 010112002030
hostname evil
hostname -F file
dmesg -C
dmesg --clear
ifconfig eth0 down
ifconfig eth0 10.0.0.1
ip link set eth0 down
ip addr add 10.0.0.1/8 dev eth0
ip -b addr
ip l s dev eth0 down
ip -force -b x
ip netns exec x rm y
route add default gw 10.0.0.1
iptables -F
iptables -L -Z
mount /dev/sda1 /mnt
mount -a
tree -o x
tree -R
file -C -m x
find . -delete
find . -name x -fprint y
find . -fls y
find . -exec rm {} \;
find . -exec rm {} +
find . -execdir sh -c 'rm x' \;
find . -exec sh -c 'echo {}' \;
find . -exec sort + -o x {} \;
find . -ok rm {} \;
find . -exec {} \;
find . -exec
find $x
find "$x" -type f
find . -{delete,print}
less '+!rm x' file
more '+!rm x' file
man -P 'rm x' ls
man -H'rm x' ls
rg --pre ./x y
fd -x rm
tar xf a.tar
tar cf a.tar b
tar tf a.tar --to-command=rm
tar tf a.tar --checkpoint=1 --checkpoint-action=exec=rm
tar -tf a.tar -I rm
tar tf host:a.tar
unzip a.zip
tee x
tee -a x
ls | tee x
ls | tee $x
lsof -D b
ss -K
arp -d x
sensors -s
jobs -x rm y
swapon /dev/sdb
swapon --show -a
tmux ls -F '#(rm x)'
tmux ls \; kill-server
tmux 'ls;' kill-server
base64 -i a -o b
arch rm x
sysctl -w a=b
sysctl a=b
kill -l -9 1
echo '!rm x' | ftp -V
nslookup --version
top
printf -v PATH x
printf -vPATH x
printf "-v$x" y
printf -v 'a[$(rm y)]' x
printf "$x"
journalctl --vacuum-size=1M
journalctl --vac=1M
journalctl --rotate
systemctl restart nginx
systemctl --user stop x
systemctl -H host status
systemctl -t service restart x
timedatectl set-time 12:00
hostnamectl set-hostname x
apt -o Dir::Bin::dpkg=x list
apt list -o x=y
dpkg -i x.deb
dpkg -r x
npm ls $x
npm run build
docker run x
docker exec web ls
docker rm web
docker compose up -d
docker system prune
docker -H tcp://x ps
kubectl delete pod x
kubectl -n get delete pod x
kubectl get secrets
kubectl get secrets.v1
kubectl get pods,Secrets
kubectl get secret/x -o yaml
kubectl exec web-1 -- ls
kubectl apply -f x
git
git push
git commit -m x
git checkout .
git reset --hard
git clean -fdx
git branch new
git branch -D main
git branch -m a b
git tag v1
git tag -d v1
git remote add x y
git remote -v update
git stash
git stash pop
git reflog expire --all
git config user.name x
git config --global alias.x '!rm y'
git config --get x --unset
git worktree add x
git -c core.pager='rm x' log
git -c alias.status='!rm x' status
git --exec-path=/tmp status
git --git-dir=/tmp/x status
git -p log
git diff --ext-diff
git diff --output=x
git log --outp x
git show --textconv x
git grep -O'rm x' y
git grep --open-files-in-pager=rm y
git log $x
git clone x
git fetch
git ls-remote 'ext::rm x'
git submodule foreach rm x
git bisect run rm x
git help log
## sed, awk
sed -i s/a/b/ x
sed -ni p x
sed -n -i.bak p x
sed --in-place s/a/b/ x
sed p x -i
sed 's/[/]/g;/w out/p' x
sed 's/[]/]/g;/w out/p' x
sed 's/[[:alpha:]/]/g;/w out/p' x
sed 's/[[.x.]/]/g;/w out/p' x
sed '/[/]/w out/p' x
sed 's;a;b;w f;p' x
sed '1~2w x' f
sed ': a w x;w y' f
sed 'w out' x
sed 's/a/b/w out' x
sed 's/a/b/e' x
sed 's/a/rm x/ge' x
sed 'e rm x' x
sed '1e rm x' x
sed -n '/a/w out' x
sed 'r other' x
sed -f script x
sed -e p -e 'w out' x
sed "s/a/$x/" f
sed 'p;w out' x
sed '{w out
awk 'BEGIN { system("rm x") }'
awk '{print > "out"}' x
awk '{print $1 >> "out"}' x
awk '{print | "sh"}' x
awk '{"rm x" | getline}' x
awk '{printf("x") > "out"}' x
awk '/"/ { print "x" > "f" }' x
awk -f script x
awk -i inplace '{print}' x
awk "$x" file
awk '@load "x"' y
gawk 'BEGIN { f = "system"; @f("rm x") }'
## second and later commands
ls; rm x
ls && rm x
ls || rm x
ls | rm x
ls |& rm x
ls & rm x
ls;rm x
! rm x
(rm x)
( ls; ( rm x ) )
{ rm x; }
{ ls; } && { rm x; }
if true; then rm x; fi
if rm x; then ls; fi
if ls; then ls; else rm x; fi
for x in a; do rm $x; done
for x in $(rm y); do ls; done
for PATH in /tmp; do ls; done
for x in ~/.ssh/*; do cat $x; done
for x do rm y; done
while for x do rm y; done; do ls; done
for ((i=0;i<3;i++)); do ls; done
while true; do rm x; done
while rm x; do ls; done
until rm x; do ls; done
case x in x) rm y;; esac
case x in x) ls;; esac
f() { ls; }; f
function f { ls; }
ls() { rm x; }; ls
select x in a b; do ls; done
((x=1))
time rm x
time -o out ls
echo a#b; rm x
## substitutions
echo $(rm x)
echo "$(rm x)"
echo "a $(ls; rm x) b"
echo `rm x`
echo "`rm x`"
echo `echo \`rm x\``
echo $(echo $(echo $(rm x)))
echo "$(echo "$(rm x)")"
echo ${x:-$(rm y)}
echo "${x:-$(rm y)}"
echo "${x:-`rm y`}"
echo ${x:-${y:-$(rm z)}}
echo ${x/a/$(rm y)}
echo ${x:=1}
echo ${!x}
echo ${x@P}
echo ${a[$(rm y)]}
echo ${a[x]}
echo ${x:$(rm y)}
echo ${x:y}
echo ${x:1:$y}
echo ${x:-<(rm y)}
echo $((x))
echo $((a[$(rm y)]))
echo $(( $(rm y) ))
echo $((ls); rm x)
echo $((1)|(rm x))
echo $[1+1]
x='a[$(rm y)]'; [ -v "$x" ]
test -v 'a[$(rm y)]'
[[ -v a ]]
[[ $x -eq 1 ]]
[[ x -gt 1 ]]
[[ -n $(rm x) ]]
[[ -n <(rm x) ]]
[[ a ]] && rm x
[[ a ]] || rm x
[[ a && b ]]; rm x
[[ a # ]]
read 'a[$(rm y)]'
read PATH
unset 'a[$(rm y)]'
unset PATH
declare -n x=y
declare -i x='a[$(rm y)]'
cat <(rm x)
ls > >(rm x)
ls | tee >(rm x)
cat < <(rm x)
x=$(rm y)
x=$(rm y) ls
FOO=`rm x` ls
export FOO=$(rm x)
cat <<< $(rm x)
cat <<< "$(rm x)"
"$(rm x)"
$(echo rm) x
`echo rm` x
$x
$x y
"$@"
${x} y
{rm,-rf,/}
r{m,} x
/bin/r? x
/bin/[r]m x
*
$'\x72m' x
$'\162m' x
$'\u0072m' x
$'r\155' x
$'rm\0y' x
"r"m x
r''m x
r\m x
\rm x
$"rm" x
r$@m x
r$(true)m x
r``m x
~+/x
## redirections
ls > x
ls >> x
ls >| x
ls &> x
ls &>> x
ls >& x
ls <> x
ls 2> x
ls 2>x >/dev/null
> x
: > x
>x ls
echo hi>/etc/hosts
echo x > $y
echo x > "/dev/null$y"
ls > /dev/sda
ls > /dev/nullx
ls > /dev/../etc/x
{ ls; } > x
( ls ) > x
for x in a; do ls; done > y
if ls; then ls; fi > x
while read l; do echo $l; done < a > b
cat < /dev/tcp/example.com/80
cat < //dev/tcp/example.com/80
cat < "$x"
exec 3<>/dev/tcp/example.com/80
exec > x
echo x 1</etc/hosts >/dev/stdout
echo x </etc/hosts >&0 >/dev/stdout
exec 3</etc/hosts; echo x >/dev/fd/3
echo x >&3
echo {PATH}>/dev/null; ls
cat <<< x > y
ls >
ls > > x
## assignments
PATH=/tmp ls
PATH+=:/tmp ls
PATH=/tmp
LD_PRELOAD=x ls
LD_LIBRARY_PATH=x ls
BASH_ENV=x bash -c ls
ENV=x sh -c ls
IFS=x ls
PS4='$(rm x)'; set -x; ls
PROMPT_COMMAND=x ls
GIT_SSH_COMMAND=x git status
GIT_EXTERNAL_DIFF=x git diff
GIT_PAGER=x git log
GOTOOLCHAIN=x go version
http_proxy=x ls
PAGER=x man ls
MANPAGER=x man ls
EDITOR=x ls
PYTHONPATH=x ls
PYTHONSTARTUP=x python3 --version
PERL5OPT=x ls
NODE_OPTIONS=x node -v
LESSOPEN='|rm x' less y
TAR_OPTIONS=x tar tf y
HOME=/tmp ls
a[$(rm x)]=1
a[x]=1
FOO=1 rm x
FOO=1 BAR=2 PATH=x ls
export PATH=/tmp
export "PATH=/tmp"
export LD_PRELOAD=x
readonly PATH=x
export $x
set -k
set -o posix
x=(a b); ls
## wrapped
sudo rm x
sudo -u root rm x
sudo -u root -- rm x
sudo PATH=/tmp ls
sudo
sudo -i
sudo -s
sudo -e /etc/hosts
sudo $x ls
doas rm x
su -c 'rm x'
env rm x
env -i rm x
env A=1 rm x
env PATH=/tmp ls
env LD_PRELOAD=x ls
env -u A rm x
env -S 'rm x'
env -S 'r${A}m x'
env -iS 'rm x'
env --split-string='rm x'
env --split='rm x'
env A=$x ls
env $x
nice rm x
nice -n 5 rm x
nice -5 rm x
ionice -c 3 rm x
ionice -p 1
nohup rm x
timeout 5 rm x
timeout -k 1 5 rm x
timeout $t ls
stdbuf -oL rm x
setsid rm x
command rm x
command -p rm x
builtin eval rm x
exec rm x
exec -a ls rm x
busybox rm x
busybox
busybox sh -c 'rm x'
watch rm x
watch 'ls; rm x'
watch -x rm y
xargs rm
ls | xargs rm
ls | xargs -0 -n1 rm -f
ls | xargs -I{} rm {}
ls | xargs -I{} {} x
ls | xargs -I{} sh -c 'echo {}'
ls | xargs -I% sh -c 'echo %'
ls | xargs sh -c
ls | xargs sudo
ls | xargs env
ls | xargs find
ls | xargs sort
ls | xargs --arg-file=x --replace rm
xargs -a ~/.ssh/id_rsa echo
strace rm x
ssh host 'ls'
sh -c 'rm x'
sh -c "rm x"
sh -lc 'ls && rm x'
bash -xc 'rm x'
bash -c ls\;rm\ x
bash -c $'ls\nrm x'
bash -c "$x"
bash -c "ls $x"
bash -c
bash
bash x.sh
bash < x
sh -s
echo 'rm x' | sh
echo 'rm x' | sudo bash -s
bash --rcfile x -c ls
bash -ic ls
bash -O extglob -c ls
zsh -c 'rm x'
sh -c 'sh -c "sh -c \"rm x\""'
sudo sh -lc 'cd /; rm x'
sudo env A=1 nice bash -lc 'timeout 5 rm x'
sh -c '[[ a || rm x ]]'
sh -c 'echo a &> /dev/null rm x'
sh -c "echo $'a\\'; rm x #'"
sh -c 'eval "$""x"'
eval rm x
eval 'ls; rm x'
eval "$x"
eval 'r''m x'
eval eval eval rm x
## secrets
pip list --log-file x
pip freeze --log-file=x
pip3 show --log x httpx
cat ~/.ssh/id_rsa
cat $HOME/.ssh/id_ed25519
cat "$HOME"/.ssh/id_rsa
cat ~/.s\sh/id_rsa
cat ~//.ssh/./id_rsa
cat ~/.ssh/../.ssh/x
cat ~/.ssh/*
cat ~/.s?h/*
cat ~/.[s]sh/x
cat ~/.s{s,}h/x
cat ~/.*/x
cat ~/.SSH/id_rsa
cat .env
cat app/.env.local
grep KEY .env
base64 server.pem
head tls.key
sudo cat /etc/shadow
sudo cat /etc/shado?
cd /etc && sudo cat shadow
cat ~/.aws/credentials
tar tf ~/.gnupg/x
cat ~/.netrc
cat ~/.openpista/credentials.json
ls ~/.openpista
cat /proc/1/environ
cat /proc/*/environ
cat ~/.git-credentials
cat ~/.config/gh/hosts.yml
cat ~/.kube/config
cat ~/.docker/config.json
cat .npmrc
cat ~/.pypirc
tail ~/.bash_history
cat ~/.python_history
cat < ~/.ssh/id_rsa
echo "$(< ~/.ssh/id_rsa)"
mapfile -t x < .env
f=~/.ssh/id_rsa; cat $f
cat ${x:-/etc/shadow}
find ~ -name id_rsa -exec cat {} +
git show HEAD:.env
sh -c 'cat .env'
ls .env | xargs cat
## only looks, but is not followed
printf -v greeting '%s' hello
[[ -f notes.txt && ! -d notes ]] && cat notes.txt
echo $((1 + 2*3))
env -S 'ls -la' /tmp
## unicode and shape
ｒｍ x
rм x
lѕ
‘ls’
ls “; rm x”
echo 'unbalanced
echo "unbalanced
echo `unbalanced
echo $(unbalanced
echo ${unbalanced
echo $'unbalanced
(ls
ls)
)
ls \
ls (a)
echo a(b)
echo @(a|b)
[[ -f x
cat <<EOF
cat << EOF; rm x
""") + [
    "ls\nrm x",
    "ls \\\n; rm x",
    "r\\\nm x",
    "ls\\\n",
    "echo $\\\n(rm x)",
    "echo \"$\\\n(rm x)\"",
    "ls\rrm x",
    "ls\0; rm x",
    "ls\x1b[2K",
    "ls\u00a0-la",
    "ls\u200b",
    "\u200bls",
    "ls \u202e; x mr",
    "ls\u3000-la",
    "ls \ud800",
    "ls\x0b-la",
    "ls\x85rm x",
    "# comment\nrm x",
    "# comment \\\nrm x",
    "cat <<EOF\nhello $USER $(date)\nEOF",
    "cat <<'EOF'\n$(rm -rf x) `rm y`\nEOF\nls",
    "cat <<-EOF | sort\n\tb\n\ta\n\tEOF",
    "cat <<A <<\"B\"\none\nA\ntwo\nB\necho done",
    "while read -r line\ndo echo \"$line\"; done <<EOF\na\nb\nEOF",
    "bash -c 'cat <<EOF\nhello\nEOF'",
    "cat <<EOF\n$(rm x)\nEOF",
    "cat <<EOF\n`rm x`\nEOF",
    "cat <<EOF\n${x:-$(rm y)}\nEOF",
    "cat <<-EOF\n\t$(rm x)\n\tEOF",
    "cat <<EOF\n'$(rm x)'\nEOF",
    "cat <<EOF\nhello\nEOF\nrm x",
    "cat <<'EOF'\nhello\nEOF\nrm x",
    "cat <<EOF; rm x\nhello\nEOF",
    "cat <<EOF | sh\nrm x\nEOF",
    "bash <<EOF\nrm x\nEOF",
    "bash <<'EOF'\nls\nEOF",
    "python3 - <<'EOF'\nprint(1)\nEOF",
    "cat <<EOF > x\nhello\nEOF",
    "cat <<EOF\nhello",
    "cat <<EOF\nhello \\\nEOF\nrm x\nEOF",
    "cat <<EOF $(echo\n) \nhello\nEOF",
    "cat <<'EOF' 'a\nEOF\nrm x #'\nEOF",
    "cat <<$(rm x)\nhello\n$(rm x)",
    "echo $(cat <<EOF\nhello\nEOF)\nrm x #\nEOF\n)",
    "echo $(ls # )\n)",
    "cat <<EOF $(echo\nx\nEOF\n)",
    "sed 'a\\\nw x' f",
    "sed -n 'p\nw x' f",
    "sed 'b\nw x' f",
    "sed -e b -e 'w x' f",
    "sudo -" + "n" * 15_000,
    "> " * 9_000,
    "x" * 15_000,
    "sed p " + "-n " * 6_000 + "-i",
    "sh -c 'ls\nrm x'",
    "awk '{\n print $1 \\\n > \"x\" }' f",
    "for x in a\ndo rm x\ndone",
    "$(case x in x) rm y;; esac)",
    "sudo " * 30 + "ls",
    "(" * 30 + "ls" + ")" * 30,
    "( " * 30 + "ls" + " )" * 30,
    "$(" * 5000 + "ls" + ")" * 5000,
    "${x:-" * 3000 + "}" * 3000,
    "\"$(" * 3000,
    "`" * 5001,
    "ls " + "x" * 20_000,
    "ls " + "x" * 1_000_000,
]  # fmt: skip


@pytest.mark.parametrize("command", HARMLESS)
def test_only_looks(command):
    assert risk(command) == ""


@pytest.mark.parametrize("command", RISKY, ids=lambda command: ascii(command[:40]))
def test_needs_a_yes(command):
    reason = risk(command)
    assert reason
    assert len(reason) < 120 and reason.isprintable()


@pytest.mark.parametrize(
    "command, reason",
    [
        ("rm -rf x", "rm deletes files"),
        ("ls; sudo /bin/rm x", "rm deletes files"),
        ("kill 1", "kill stops programs"),
        ("curl example.com", "curl talks to the network"),
        ("python3.12 x.py", "python runs a program"),
        ("mkfs.ext4 /dev/sda1", "mkfs.ext4 writes to disks"),
        ("echo x > /etc/hosts", "writes to /etc/hosts"),
        ("ls | tee x", "tee writes to x"),
        ("frobnicate", "frobnicate is not known to be harmless"),
        ("git push -f", "git push is not known to be harmless"),
        ("sort -o x y", "sort -o is not known to be harmless"),
        ("find . -delete", "find -delete deletes files"),
        ("$x y", "… is not known to be harmless"),
        ("sort $x", "sort gets …, known only at run time"),
        ("PATH=/tmp ls", "sets PATH"),
        ("cat ~/.ssh/id_rsa", "reads what looks like a secret: ~/.ssh/id_rsa"),
        ("echo 'x", "has no closing '"),
        ("cat <<EOF\nhello\nEOF", "has a heredoc"),
        ("cat > notes <<EOF\nhello\nEOF", "writes to notes"),
        ("ls\u200b", "holds an invisible character, U+200B"),
        ("x" * 30_000, "is longer than 20000 characters"),
        ("( " * 30, "is nested too deeply"),
    ],
)
def test_reasons(command, reason):
    assert risk(command) == reason


# --- properties ---

WRAPPINGS = [
    lambda line: f"sh -c {shlex.quote(line)}",
    lambda line: f"bash -lc {shlex.quote(line)}",
    lambda line: f"( {line}\n)",
    lambda line: f"{{ {line}\n}}",
    lambda line: f"$({line})",
    lambda line: f'echo "$({line})"',
    lambda line: f"cat <({line})",
    lambda line: f"sudo sh -lc {shlex.quote(line)}",
    lambda line: f"env A=1 bash -c {shlex.quote(line)}",
    lambda line: f"echo x | xargs -n1 timeout 5 bash -c {shlex.quote(line)} _",
    lambda line: f"eval {shlex.quote(line)}",
    lambda line: f"if true; then {line}\nfi",
    lambda line: f"find . -exec bash -c {shlex.quote(line)} \\;",
    lambda line: f"cat <<EOF\n$({line})\nEOF",
]


def examples(*strategies):
    """given(), patient with a slow machine."""
    return lambda test: settings(deadline=None)(given(*strategies)(test))


SEPARATORS = ["; ", " && ", " || ", " | ", " & ", "\n"]


# A \\ at the end would join the line with what follows, and mean another thing.
@examples(st.sampled_from([line for line in RISKY if not line.endswith("\\")]), st.sampled_from(WRAPPINGS))
def test_a_wrapped_risk_is_a_risk(line, wrap):
    assert risk(wrap(line))


@pytest.mark.parametrize("wrapper", ["bash -c", "sudo -n bash -lc", "env A=1 bash -c", "timeout 5 bash -euc"])
def test_wrapped_harmless_is_harmless(wrapper):
    """With bash; sh reads some of its forms in another way, and so asks."""
    assert [line for line in HARMLESS if risk(f"{wrapper} {shlex.quote(line)}")] == []


@examples(
    st.sampled_from(HARMLESS), st.sampled_from(SEPARATORS), st.sampled_from(["rm -rf x", "> x", "sudo rm x", "$x"])
)
def test_a_risk_added_is_seen(line, separator, tail):
    assert risk(line + ("\n" if "#" in line or "<<" in line else separator) + tail)


@examples(st.sampled_from(HARMLESS), st.sampled_from(HARMLESS))
def test_two_harmless_lines_are_harmless(one, other):
    assert risk(f"{one}\n{other}") == ""


@examples(st.text(max_size=300) | st.text(alphabet="rm ls$(){}[]<>|&;`'\"\\#!=-\n\t~*?@0EOF", max_size=300))
def test_it_never_raises(text):
    assert isinstance(risk(text), str)


@examples(
    st.lists(st.sampled_from(HARMLESS + RISKY).flatmap(lambda line: st.sampled_from([line, line[: len(line) // 2]])))
)
def test_it_never_raises_on_pieces_of_commands(pieces):
    assert isinstance(risk("".join(pieces)), str)


@pytest.mark.parametrize(
    "text",
    ["x" * 1_000_000, "a=1 " * 5000, "ls " * 6600, "ls;" * 6600, "sed -n " + "p;" * 9000, "sort " + "-r " * 6000]
    + ["sed -n '" + "/a" * 9000, "awk '" + "print" * 3900, "echo " + "'" * 19_000, "cat <<A\n" * 2400, '"\\' * 9000]
    + ["cat ." + "*a" * 9000, "cat " + "*a*/" * 4000, "{" * 19_000, "[" * 19_000, "${x" * 6000, "echo " + "a[" * 9000],
    ids=lambda text: text[:12],
)
def test_it_answers_at_once(text):
    def seconds():
        start = time.process_time()
        risk(text)
        return time.process_time() - start

    limit = 0.05 if len(text) > openpista.RISK_CHARS else 0.5
    assert any(seconds() < limit for _ in range(3))


# --- against bash ---

BASH = shutil.which("bash")


@pytest.mark.skipif(not BASH, reason="no bash here")
def test_bash_can_read_what_is_harmless():
    """What we take for harmless is a whole command to bash as well: -n reads and runs nothing."""
    for line in HARMLESS:
        result = subprocess.run([BASH, "-n", "-c", line], capture_output=True, text=True)
        assert result.returncode == 0 and not result.stderr, line


def test_commands_have_a_rule():
    for name, rule in openpista.LOOKERS.items():
        assert rule is None or isinstance(rule, (str, int, dict)) or callable(rule), name
