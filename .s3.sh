export PATH=/opt/flex/bin:/usr/sbin:/usr/bin:/sbin:/bin OMP_NUM_THREADS=1
cd /tmp
cp /srv/fed/fed/packages/clinic.tar.gz . && tar xf clinic.tar.gz
flex worker clinic --model trial/model --data trial/clinic/train.jsonl --with-node > /tmp/clinic.log 2>&1 &
echo $! > /tmp/clinic.pid
S=$(date +%s)
runuser -u flex-server -- flex deploy run /srv/fed/fed > /tmp/run1.log 2>&1
echo "rc $? after $(( $(date +%s) - S )) s" >> /tmp/run1.log
