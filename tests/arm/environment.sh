#!/bin/sh
# An aarch64 Python with torch, in the folder $1, for qemu-user: Debian's packages unpacked into system/, wheels, which the
# Python $2 has a pip for, into packages/, and bin/python, which starts it. Nothing is installed: nobody needs to be root.
set -eu
requirements=$PWD/constraints-arm.txt
case "$2" in /*) python=$2 ;; *) python=$PWD/$2 ;; esac
mkdir -p "$1" && cd "$1"
here=$PWD
rm -rf system packages apt && mkdir -p system bin apt/lists/partial apt/cache/archives/partial
keys=/usr/share/keyrings/debian-archive-keyring.gpg
echo "deb [signed-by=$keys] http://deb.debian.org/debian bookworm main" > apt/sources.list
: > apt/status
cat > apt/apt.conf <<END
APT::Architecture "arm64";
APT::Architectures "arm64";
Dir::State "$here/apt";
Dir::State::status "$here/apt/status";
Dir::Cache "$here/apt/cache";
Dir::Etc::sourcelist "$here/apt/sources.list";
Dir::Etc::sourceparts "-";
END
export APT_CONFIG="$here/apt/apt.conf"
apt-get -qq update
# Python with what it is linked to, and torch's C++ library; not what Debian would need to run.
(cd apt && apt-get -qq download gcc-12-base libbz2-1.0 libc6 libcrypt1 libexpat1 libffi8 libgcc-s1 liblzma5 \
    libpython3.11-minimal libpython3.11-stdlib libsqlite3-0 libssl3 libstdc++6 libuuid1 python3.11-minimal zlib1g)
for package in apt/*.deb; do dpkg -x "$package" system; done
unset APT_CONFIG

platforms=
for libc in 2_17 2_24 2_26 2_27 2_28 2_31 2_34; do platforms="$platforms --platform manylinux_${libc}_aarch64"; done
install() {
    "$python" -m pip install -qq --disable-pip-version-check --target packages --only-binary=:all: --python-version 3.11 \
        --implementation cp --abi cp311 --abi abi3 --abi none $platforms --platform manylinux2014_aarch64 "$@"
}
# torch by itself: pip reads what a wheel asks for as on this machine, and on x86 that is CUDA.
install --no-deps "$(grep '^torch==' "$requirements")"
grep -v '^torch==' "$requirements" > apt/others.txt
install -r apt/others.txt
rm -rf apt

# Under the wrapper's name, so that sys.executable starts an emulator again.
cat > bin/python <<END
#!/bin/sh
export PYTHONHOME="$here/system/usr" PYTHONPATH="$here/packages\${PYTHONPATH:+:\$PYTHONPATH}"
exec qemu-aarch64 -0 "$here/bin/python" -L "$here/system" "$here/system/usr/bin/python3.11" "\$@"
END
chmod +x bin/python
