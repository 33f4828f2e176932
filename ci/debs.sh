# Debian packages without installing them. Sourced by ci/setup and vm-images/build.
# shellcheck shell=bash

# Everything these scripts make goes here; removing the folder costs only time.
cache_dir() {
    local dir=${VHOST_REMAP_CACHE:-}
    if [[ -z $dir ]]; then
        dir=${XDG_CACHE_HOME:-${HOME:?set it, XDG_CACHE_HOME or VHOST_REMAP_CACHE: there has to be a place to build in}/.cache}/vhost-remap
    fi
    realpath -m "$dir"
}

# Tools unpacked by ci/setup come last: whatever the machine has already wins. The sbin folders are not
# on an ordinary user's path in Debian, and mkfs and depmod live there.
tools_path() {
    local path=$PATH dir
    if ! command -v cargo >/dev/null && [[ -x ${HOME:-}/.cargo/bin/cargo ]]; then
        path=$HOME/.cargo/bin:$path
    fi
    for dir in /usr/sbin /sbin "$(cache_dir)/tools/bin"; do
        [[ :$path: == *:$dir:* ]] || path+=:$dir
    done
    echo "$path"
}

# Prints where the machine has UEFI firmware for guests, or `ci/setup` has unpacked it.
ovmf_path() {
    local root
    for root in "" "$(cache_dir)/tools/root"; do
        [[ ! -r $root/usr/share/ovmf/OVMF.fd ]] || { echo "$root/usr/share/ovmf/OVMF.fd" && return; }
    done
    return 1
}

# All of apt is called through here, so that it never asks, waits for another apt, and works for an
# ordinary user on package lists of his own where the machine's are missing or out of date.
apt() {
    local tool=$1 lists
    shift
    local options=(-q -o DPkg::Lock::Timeout=120 -o APT::Sandbox::User=root)
    lists=$(cache_dir)/apt
    if ((EUID != 0)) && [[ -d $lists/lists ]]; then
        options+=(-o "Dir::State::lists=$lists/lists" -o "Dir::Cache=$lists/cache")
    fi
    DEBIAN_FRONTEND=noninteractive LC_ALL=C "$tool" "${options[@]}" "$@" </dev/null
}

apt_update() {
    local lists
    lists=$(cache_dir)/apt
    ((EUID == 0)) || mkdir -p "$lists/lists/partial" "$lists/cache/archives/partial"
    echo "updating the package lists" >&2
    # A source that cannot be reached is no matter as long as the packages are found in the others.
    apt apt-get update >/dev/null || true
}

# Fails unless every package is to be had. (`apt-cache show` would be content with an installed one.)
apt_knows() {
    local known package
    known=$(apt apt-cache madison "$@" 2>/dev/null) || return 1
    for package in "$@"; do
        grep -q "^ *$package |" <<<"$known" || return 1
    done
}

# apt_closure STATUS PACKAGE…: prints name=version for each package that apt would add, in order to have
# those named, to a machine whose dpkg status file is STATUS.
apt_closure() {
    local status=$1
    shift
    apt apt-get -s -o "Dir::State::status=$status" --no-install-recommends install "$@" 2>/dev/null |
        sed -nE 's/^Inst ([^ ]+) (\[[^]]*\] )?\(([^ ]+) .*/\1=\3/p'
}

# apt_fetch FOLDER NAME=VERSION…: downloads the packages themselves into FOLDER.
apt_fetch() {
    local folder=$1
    shift
    (cd "$folder" && apt apt-get download "$@" >/dev/null)
}

# apt_unpack ROOT DEB…: unpacks into a tree where /bin, /sbin and /lib are links into /usr, as on an
# installed Debian, whatever the age of the package.
apt_unpack() {
    local root=$1 deb dir
    shift
    for dir in bin sbin lib lib64; do
        mkdir -p "$root/usr/$dir"
        [[ -L $root/$dir ]] || ln -s "usr/$dir" "$root/$dir"
    done
    for deb in "$@"; do
        dpkg-deb --fsys-tarfile "$deb" |
            tar -x -C "$root" --keep-directory-symlink --no-same-owner
    done
}
